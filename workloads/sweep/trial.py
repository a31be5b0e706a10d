"""One trial of a sweep: its settings, status and results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["waiting", "running", "finished", "stopped", "failed"]
END_STATUSES: tuple[Status, ...] = ("finished", "stopped", "failed")


@dataclass(slots=True)
class Trial:
    """A point of the search space, trained with one seed.

    settings: the swept fields and `seed`. status: `stopped` means ended early by the scheduler. metrics: the
    last reported ones, by their MLflow names. curve: (step, metrics) of every report. seconds: spent in
    training, over all restarts. restarts: what was lost before each one, and why. folder, run_id: the trial's
    run folder and MLflow run.
    """

    number: int
    settings: dict[str, Any]
    status: Status = "waiting"
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.0
    restarts: list[str] = field(default_factory=list)
    folder: str | None = None
    run_id: str | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the trial finished, was stopped or failed."""
        return self.status in END_STATUSES

    @property
    def point(self) -> dict[str, Any]:
        """The settings without the seed; trials of the same point are repetitions."""
        return {name: value for name, value in self.settings.items() if name != "seed"}

    def describe(self) -> str:
        """The settings as `key=value`, separated by spaces."""
        return " ".join(f"{name}={value}" for name, value in self.settings.items())
