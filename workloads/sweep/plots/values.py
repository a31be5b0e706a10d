"""Settings and metrics of trials as values that a plot can group, sort and scale."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence

from workloads.sweep.trial import Trial

PlotValue = float | str  # of a setting: numbers can be scaled, everything else is a category

MISSING = "null"  # the value of a field that a point does not set
_LOG_SCALE_RATIO = 30  # largest over smallest value above which an axis is logarithmic
_MAX_LABEL_CHARS = 24


def varied_fields(trials: Sequence[Trial]) -> list[str]:
    """The swept fields that have at least two values among the trials, without the seed."""
    fields = dict.fromkeys(field for trial in trials for field in trial.point)
    return [field for field in fields if len({setting_value(trial, field) for trial in trials}) > 1]


def metric_value(trial: Trial, metric: str) -> float | None:
    """The metric; None if it is missing or not finite."""
    value = trial.metrics.get(metric)
    return value if value is not None and math.isfinite(value) else None


def finished_with(trials: Sequence[Trial], objective: str) -> list[Trial]:
    """The trials that finished with a finite objective; only these may be compared."""
    return [
        trial for trial in trials if trial.status == "finished" and metric_value(trial, objective) is not None
    ]


def setting_value(trial: Trial, field: str) -> PlotValue:
    """The setting as a hashable value: a finite number as float, everything else as text."""
    value = trial.settings.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def sorted_values(values: Iterable[PlotValue]) -> list[PlotValue]:
    """The distinct values in order, numbers before categories."""
    return sorted(set(values), key=lambda value: (isinstance(value, str), value))


def format_label(value: PlotValue) -> str:
    """A short label for matplotlib: `$`, which begins a formula, is escaped; lone surrogates are replaced."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"
    short = value if len(value) <= _MAX_LABEL_CHARS else f"…{value[1 - _MAX_LABEL_CHARS :]}"
    return short.encode(errors="replace").decode().replace("$", r"\$")


def needs_log_scale(values: Collection[float]) -> bool:
    """Whether the values are positive and span more than an order of magnitude."""
    return min(values) > 0 and max(values) / min(values) > _LOG_SCALE_RATIO
