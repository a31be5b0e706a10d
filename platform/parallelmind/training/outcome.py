"""Outcome of a training run, in a module that imports no model library."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """End of a run. finished: False if the run was stopped. metrics: the latest ones."""

    finished: bool
    step: int
    metrics: dict[str, float]
