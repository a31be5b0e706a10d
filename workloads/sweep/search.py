"""Which point is tried next: all of a grid, draws from a space, or what optuna thinks best of what is known
so far.

All of them are functions of the configuration and of the trials so far, so there is no state of a search to
keep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from statistics import fmean
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from workloads.sweep.config import Between, SweepConfig, is_whole, number
from workloads.sweep.trial import Trial

optuna.logging.set_verbosity(optuna.logging.WARNING)


def point(config: SweepConfig, index: int, trials: Sequence[Trial]) -> dict[str, Any] | None:
    """The settings of a point, None after the last. trials: all that have been begun."""
    if config.search == "grid":
        return next(islice(config.grid(), index, None), None)
    assert config.trials is not None
    if index >= config.trials:
        return None
    if index < len(config.points):
        return config.points[index]
    return _drawn(config, index) if config.search == "random" else _asked(config, index, trials)


def _drawn(config: SweepConfig, index: int) -> dict[str, Any]:
    generator = np.random.default_rng([config.search_seed, index])
    return {name: _draw(name, values, generator) for name, values in config.space.items()}


def _draw(name: str, values: list[Any] | Between, generator: np.random.Generator) -> Any:
    if isinstance(values, list):
        return values[int(generator.integers(len(values)))]
    low, high = values.low, values.high + is_whole(name)
    drawn = (
        math.exp(generator.uniform(math.log(low), math.log(high)))
        if values.log
        else generator.uniform(low, high)
    )
    return number(name, min(drawn, values.high))


def _asked(config: SweepConfig, index: int, trials: Sequence[Trial]) -> dict[str, Any]:
    """What a study, told of all points so far, suggests. Points under way count as bad, so that others are
    tried meanwhile.
    """
    sampler = optuna.samplers.TPESampler(seed=config.search_seed + index, constant_liar=True)
    study = optuna.create_study(directions=["minimize"] * len(config.metrics), sampler=sampler)
    space = {name: _distribution(name, values) for name, values in config.space.items()}
    for group in by_point(trials):
        if known := _as_told(config, group, space):
            study.add_trial(known)
    asked = study.ask(space)
    return {name: _restored(config.space[name], value) for name, value in asked.params.items()}


def _as_told(
    config: SweepConfig, group: Sequence[Trial], space: Mapping[str, BaseDistribution]
) -> optuna.trial.FrozenTrial | None:
    settings = group[0].settings
    if not all(name in settings and _inside(values, settings[name]) for name, values in config.space.items()):
        return None  # one of `points`, from elsewhere
    params = {name: _stored(values, settings[name]) for name, values in config.space.items()}
    values = objectives(config, group)
    if values is not None:
        return create_trial(params=params, distributions=dict(space), values=values)
    state = TrialState.FAIL if all(trial.ended for trial in group) else TrialState.RUNNING
    return create_trial(state=state, params=params, distributions=dict(space))


def _distribution(name: str, values: list[Any] | Between) -> BaseDistribution:
    if isinstance(values, list):
        return CategoricalDistribution(range(len(values)))  # a list or a mapping is no category of optuna's
    if is_whole(name):
        return IntDistribution(math.ceil(values.low), math.floor(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _inside(values: list[Any] | Between, value: Any) -> bool:
    return value in values if isinstance(values, list) else values.low <= value <= values.high


def _stored(values: list[Any] | Between, value: Any) -> Any:
    return values.index(value) if isinstance(values, list) else value


def _restored(values: list[Any] | Between, value: Any) -> Any:
    return values[value] if isinstance(values, list) else value


def by_point(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials that differ in their seed only, together."""
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(repr(trial.point), []).append(trial)
    return list(found.values())


def objectives(config: SweepConfig, group: Sequence[Trial]) -> list[float] | None:
    """Mean over a point's seeds of each metric; None until all are over, or where one of them has none."""
    if not all(trial.status in ("finished", "stopped") for trial in group):
        return None
    columns = [[trial.metrics.get(name, math.nan) for trial in group] for name in config.metrics]
    means = [fmean(column) for column in columns]
    return means if all(map(math.isfinite, means)) else None


def winner(config: SweepConfig, trials: Sequence[Trial]) -> Trial | None:
    """Of the points that ran to their end, the one with the lowest sum of the metrics; of its seeds, the one
    with the lowest.
    """
    groups = [group for group in by_point(trials) if all(trial.status == "finished" for trial in group)]
    scored = [(sum(values), group) for group in groups if (values := objectives(config, group)) is not None]
    if not scored:
        return None
    _, best = min(scored, key=lambda item: (item[0], item[1][0].number))
    return min(best, key=lambda trial: sum(trial.metrics[name] for name in config.metrics))
