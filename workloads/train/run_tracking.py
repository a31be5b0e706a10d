"""The metrics and result of a run: in its folder, in MLflow and, with track=wandb, in Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from parallelmind.config import TrainConfig
from parallelmind.errors import first_line
from parallelmind.redaction import redact_uri, redact_values
from parallelmind.wandb_run import WandbRun, WandbTarget, wandb_environment, wandb_project
from workloads.train.metrics_file import MetricPoint, MetricsFile
from workloads.train.run_dir import RunDir
from workloads.train.tracking_sender import TrackingSender

if TYPE_CHECKING:
    from parallelmind.tracking import Tracker


def wandb_target(
    config: TrainConfig,
    run_dir: RunDir,
    run_id: str,
    group: str | None = None,
    tags: Mapping[str, object] | None = None,
) -> WandbTarget | None:
    """The run in Weights & Biases, None if the run is tracked in MLflow alone.

    run_id: of the MLflow run; both have the same. group: of the trials of a sweep. tags: further values of
    the run's configuration there.
    """
    if config.services.track != "wandb":
        return None
    fields = config.with_global_batch_size().model_dump(mode="json")
    texts = {name: redact_uri(str(value)) for name, value in (tags or {}).items()}
    return WandbTarget(
        run_id,
        run_dir.name,
        wandb_project(config.services.mlflow_experiment),
        group,
        {**redact_values(fields), **texts},
        run_dir.path.local,
        wandb_environment(),
    )


class RunTracking:
    """Writes metrics to the run's folder at once, and has them sent. Only one process of a run has one.

    mlflow_uri, mlflow_run: where MLflow has the run.
    """

    def __init__(
        self,
        run_dir: RunDir,
        mlflow_uri: str,
        mlflow_run: str,
        wandb: WandbTarget | None,
        print_line: Callable[[str], None],
    ) -> None:
        self._metrics, self._file = MetricsFile(run_dir.metrics_file), run_dir.metrics_file
        points = self._metrics.points
        self._senders: list[TrackingSender] = [
            MlflowSender(run_dir, points, print_line, mlflow_uri, mlflow_run)
        ]
        if wandb:
            self._senders.append(WandbSender(run_dir, points, print_line, wandb))
        for sender in self._senders:
            sender.start()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write metrics to the run's folder, and have them sent."""
        self._metrics.append(metrics, step)
        for sender in self._senders:
            sender.wake()

    def upload(self) -> None:
        """Copy the metrics to the run's URI, so that a killed run finds them beside its checkpoint."""
        self._file.upload()

    def close(self, status: str) -> None:
        """Send what is left, for some seconds. May be called twice. status: that the run is left with."""
        for sender in self._senders:
            sender.close(status)
        self.upload()

    def finish(self, result: Path) -> None:
        """Send what is left, store the result and the loss plot, and end the run; list what is not stored."""
        for sender in self._senders:
            sender.finish(result)
        self.upload()


class MlflowSender(TrackingSender):
    """Sends to MLflow. The driver ends a run that is not finished here."""

    name = "mlflow"

    def __init__(
        self,
        run_dir: RunDir,
        points: Sequence[MetricPoint],
        print_line: Callable[[str], None],
        uri: str,
        run_id: str,
    ) -> None:
        super().__init__(run_dir, points, print_line)
        self._uri, self._run_id = uri, run_id

    def _open(self) -> Tracker:
        from parallelmind.tracking import Tracker

        return Tracker(self._uri, self._run_id)

    def _explain(self, error: Exception) -> str:
        from parallelmind.tracking import store_problem

        return store_problem(error)


class WandbSender(TrackingSender):
    """Sends to Weights & Biases. The process that has opened a run there also ends it."""

    name = "wandb"

    def __init__(
        self,
        run_dir: RunDir,
        points: Sequence[MetricPoint],
        print_line: Callable[[str], None],
        target: WandbTarget,
    ) -> None:
        super().__init__(run_dir, points, print_line)
        self._target = target

    def close(self, status: str) -> None:
        super().close(status)
        if self._run is not None:
            self._attempt(lambda run: run.finish(status))

    def _open(self) -> WandbRun:
        run = WandbRun(self._target)
        self._print_line(f"wandb: {run.place}")
        return run

    def _explain(self, error: Exception) -> str:
        return redact_uri(first_line(error))
