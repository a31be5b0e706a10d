"""What becomes of a training run. It has a module of its own, so that who only hands it on loads no model
library for it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """finished: false where a stop was asked for. metrics: the last ones."""

    finished: bool
    step: int
    metrics: dict[str, float]
