"""Values of the search space as values of a training run's fields."""

from __future__ import annotations

import math
from typing import Any

from parallelmind.config import TrainConfig
from parallelmind.errors import UserError, format_value
from workloads.sweep.config import Between, SweepConfig


def check_space(config: SweepConfig) -> None:
    """Raise UserError unless training accepts what the sweep may try.

    A grid is checked point by point; for the other searches, every point of `points` and every value or end
    of a range alone.
    """
    for name, values in config.search_space.space.items():
        _check_range(name, values)
    if config.strategy.search == "grid":
        points = list(config.search_space.grid())
    else:
        single_values = [
            {name: value}
            for name, values in config.search_space.space.items()
            for value in _endpoints(name, values)
        ]
        points = [*config.search_space.points, *single_values]
    for settings in points:
        try:
            config.trial_config(0, settings, config.train.run.output_dir)
        except UserError as error:
            written = " ".join(f"{name}={format_value(value)}" for name, value in settings.items())
            raise UserError(f"space: {written}: {error}") from error


def _check_range(name: str, values: list[Any] | Between) -> None:
    """Raise UserError for a range of an integer field without an integer."""
    if isinstance(values, Between) and is_integer_field(name) and math.ceil(values.low) > values.high:
        raise UserError(
            f"space.{name}: holds no whole number from {values.low} to {values.high}; widen the range"
        )


def is_integer_field(name: str) -> bool:
    """Whether a field of TrainConfig holds integers."""
    return "float" not in str(TrainConfig.flat_fields()[name].annotation)


def to_field_value(name: str, number: float) -> float | int:
    """The number in the type of the field; rounded down for an integer field."""
    return math.floor(number) if is_integer_field(name) else number


def _endpoints(name: str, values: list[Any] | Between) -> list[Any]:
    """The values of a list, or both ends of a range."""
    if isinstance(values, list):
        return values
    return [to_field_value(name, values.low), to_field_value(name, values.high)]
