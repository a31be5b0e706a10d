"""Callbacks of the training loop: metrics, progress lines, reports and stop requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Hooks(Protocol):
    """Interface of the callbacks. Every worker calls each of them at the same step."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics."""

    def print_line(self, line: str) -> None:
        """Print a progress line."""

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        """Report the latest metrics, after a validation or a checkpoint."""

    def should_stop(self) -> bool:
        """Whether the run should save a checkpoint and end after this step."""
