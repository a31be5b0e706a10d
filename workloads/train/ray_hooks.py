"""Hooks of the training loop under Ray Train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ray.train

from workloads.train.mlflow_sender import MlflowSender
from workloads.train.run_dir import RunDir


class RayHooks:
    """Rank 0 logs metrics to MLflow and prints lines. Every worker reports to Ray Train: a barrier."""

    def __init__(self, run_dir: RunDir, mlflow_uri: str, mlflow_run: str, is_leader: bool) -> None:
        self._is_leader = is_leader
        self._stop_file = run_dir.stop_file() if is_leader else None
        self._sender = MlflowSender(run_dir, mlflow_uri, mlflow_run, self.print_line) if is_leader else None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._sender:
            self._sender.log(metrics, step)

    def finish(self, result: Path) -> None:
        """Store the result in MLflow and end its run."""
        if self._sender:
            self._sender.finish(result)

    def close(self) -> None:
        """Send the metrics that are left."""
        if self._sender:
            self._sender.close()

    def print_line(self, line: str) -> None:
        if self._is_leader:
            print(line, flush=True)

    def should_stop(self) -> bool:
        return self._stop_file is not None and self._stop_file.is_requested()

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        ray.train.report({**metrics, "step": step})
