"""One line of a sweep's table: what was tried, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["waiting", "running", "finished", "stopped", "failed"]


@dataclass(slots=True)
class Trial:
    """A point of the search space, trained once with one seed.

    settings: the swept fields and `seed`. metrics: the last reported ones, by the names that MLflow shows.
    curve: (step, metrics) of every report. seconds: in training, all starts together. stopped: ended early by
    the scheduler.
    """

    number: int
    settings: dict[str, Any]
    status: Status = "waiting"
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0
    folder: str | None = None
    run_id: str | None = None
    error: str | None = None

    @property
    def over(self) -> bool:
        return self.status in ("finished", "stopped", "failed")

    @property
    def point(self) -> dict[str, Any]:
        """The settings without the seed: trials that share it are repetitions."""
        return {name: value for name, value in self.settings.items() if name != "seed"}

    def told(self) -> str:
        """The settings in the form of the command line."""
        return " ".join(f"{name}={value}" for name, value in self.settings.items())
