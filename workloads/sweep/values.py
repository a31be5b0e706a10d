"""What of a trial's settings and metrics a picture can show."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence

from workloads.sweep.trial_table import Trial

Value = float | str  # of a setting: numbers can be scaled, all else is a category

MISSING = "null"  # of a field that a point leaves as it is
_LOG_SPAN = 30  # largest over smallest value from which a scale is logarithmic
_LABEL_WIDTH = 24  # characters


def varied(trials: Sequence[Trial]) -> list[str]:
    """The swept fields of which the trials have two values or more, without the seed."""
    fields = dict.fromkeys(field for trial in trials for field in trial.point)
    return [field for field in fields if len({setting(trial, field) for trial in trials}) > 1]


def measured(trial: Trial, metric: str) -> float | None:
    """None where it is missing or not finite: it has no place in a picture then."""
    value = trial.metrics.get(metric)
    return value if value is not None and math.isfinite(value) else None


def setting(trial: Trial, field: str) -> Value:
    """Something to group, sort and compare by, whatever was swept."""
    value = trial.settings.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def in_order(values: Iterable[Value]) -> list[Value]:
    """Each value once; numbers first."""
    return sorted(set(values), key=lambda value: (isinstance(value, str), value))


def label(value: Value) -> str:
    """Short, and without what cannot be drawn: a `$`, which would begin a formula, and lone surrogates."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"
    cut = value if len(value) <= _LABEL_WIDTH else f"…{value[1 - _LABEL_WIDTH :]}"
    return cut.encode(errors="replace").decode().replace("$", r"\$")


def wants_log(values: Collection[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > _LOG_SPAN
