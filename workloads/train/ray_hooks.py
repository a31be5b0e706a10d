"""Hooks of the training loop under Ray Train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import ray.train

from parallelmind.wandb_run import WandbTarget
from workloads.train.run_dir import RunDir
from workloads.train.run_tracking import RunTracking


class RayHooks:
    """Rank 0 tracks the run and prints lines. Every worker reports to Ray Train: a barrier.

    As a context, it sends the metrics that are left at its end.
    """

    def __init__(
        self,
        run_dir: RunDir,
        mlflow_uri: str,
        mlflow_run: str,
        is_leader: bool,
        wandb: WandbTarget | None = None,
    ) -> None:
        self._is_leader = is_leader
        self._stop_file = run_dir.stop_file() if is_leader else None
        self._tracking = (
            RunTracking(run_dir, mlflow_uri, mlflow_run, wandb, self.print_line) if is_leader else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._tracking:
            self._tracking.close("KILLED" if kind is None else "FAILED")  # without effect on a finished run

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._tracking:
            self._tracking.log(metrics, step)

    def finish(self, result: Path) -> None:
        """Store the result where the run is tracked, and end the run there."""
        if self._tracking:
            self._tracking.finish(result)

    def print_line(self, line: str) -> None:
        if self._is_leader:
            print(line, flush=True)

    def should_stop(self) -> bool:
        return self._stop_file is not None and self._stop_file.is_requested()

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        if self._tracking:
            self._tracking.upload()
        ray.train.report({**metrics, "step": step})
