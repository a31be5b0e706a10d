"""Hooks of the training loop under Ray Train."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import ray.train

from workloads.train.run_dir import RunDir

if TYPE_CHECKING:
    from parallelmind.tracking import Tracker


class RayHooks:
    """Rank 0 logs metrics to MLflow and prints lines. Every worker reports to Ray Train: a barrier."""

    def __init__(self, run_dir: RunDir, mlflow_uri: str, mlflow_run: str, is_leader: bool) -> None:
        self._is_leader = is_leader
        self._stop_file = run_dir.stop_file() if is_leader else None
        # Importing MLflow and opening its database takes seconds: it happens during the first step.
        self._opening = (
            ThreadPoolExecutor(1).submit(_open_tracker, mlflow_uri, mlflow_run) if is_leader else None
        )

    @property
    def tracker(self) -> Tracker | None:
        """The MLflow run, on rank 0."""
        return self._opening.result() if self._opening else None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self.tracker:
            self.tracker.log_metrics(metrics, step)

    def print_line(self, line: str) -> None:
        if self._is_leader:
            print(line, flush=True)

    def should_stop(self) -> bool:
        return self._stop_file is not None and self._stop_file.is_requested()

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        ray.train.report({**metrics, "step": step})


def _open_tracker(uri: str, run_id: str) -> Tracker:
    from parallelmind.tracking import Tracker

    return Tracker(uri, run_id)
