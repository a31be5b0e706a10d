"""Which point of the search space is tried next: of a grid, by random draws, or by optuna.

A search has no state: the next point is a function of the configuration and the trials so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from workloads.sweep.config import Between, SweepConfig
from workloads.sweep.optuna_search import suggest_point
from workloads.sweep.space import is_integer_field, to_field_value
from workloads.sweep.trial import Trial


def choose_point(config: SweepConfig, index: int, trials: Sequence[Trial]) -> dict[str, Any] | None:
    """The settings of point number `index`; None after the last point. trials: all that were started."""
    if config.strategy.search == "grid":
        return next(islice(config.search_space.grid(), index, None), None)
    assert config.strategy.trials is not None
    if index >= config.strategy.trials:
        return None
    if index < len(config.search_space.points):
        return config.search_space.points[index]
    return (
        draw_point(config, index)
        if config.strategy.search == "random"
        else suggest_point(config, index, trials)
    )


def draw_point(config: SweepConfig, index: int) -> dict[str, Any]:
    """A random point, which depends on `search_seed` and `index` alone."""
    generator = np.random.default_rng([config.strategy.search_seed, index])
    return {name: _draw(name, values, generator) for name, values in config.search_space.space.items()}


def _draw(name: str, values: list[Any] | Between, generator: np.random.Generator) -> Any:
    if isinstance(values, list):
        return values[int(generator.integers(len(values)))]
    low, high = values.low, values.high + is_integer_field(name)
    drawn = (
        math.exp(generator.uniform(math.log(low), math.log(high)))
        if values.log
        else generator.uniform(low, high)
    )
    return to_field_value(name, min(drawn, values.high))
