"""Conclude a run: close it in MLflow, and print where everything is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from parallelmind.config import TrainConfig
from parallelmind.model.manifest import MANIFEST
from parallelmind.redaction import redact_uri
from parallelmind.tracking import Tracker, absolute_uri, go_on_without_store
from parallelmind.training.checkpoint_manager import checkpoint_names
from parallelmind.training.outcome import Outcome
from workloads.train.prepare import PreparedRun
from workloads.train.provenance import save_loss_plot
from workloads.train.run_dir import RunDir
from workloads.train.run_tracking import RunTracking, wandb_target


@contextmanager
def close_tracker(tracker: Tracker) -> Iterator[Callable[[Outcome], None]]:
    """Close the MLflow run with the status of the outcome that is passed to the yielded function.

    Without an outcome the status is KILLED after Ctrl-C and FAILED after any other exception.
    """
    status = "FAILED"

    def set_outcome(outcome: Outcome) -> None:
        nonlocal status
        status = "FINISHED" if outcome.finished else "KILLED"

    try:
        yield set_outcome
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        with go_on_without_store(f"the status {status} of run {tracker.run_id}"):
            tracker.finish(status)


def conclude(run: PreparedRun, outcome: Outcome) -> None:
    """Print where the results of a finished run are. Raises KeyboardInterrupt for a stopped run."""
    run_dir = run.task.run_dir
    run_dir.stop_file().clear()
    if not outcome.finished:
        save_loss_plot(run_dir)
        with go_on_without_store("the loss plot"):
            run.tracker.log_file(run_dir.loss_plot.local)
        print(
            f"stopped at step {outcome.step}; checkpoint: {_newest_checkpoint(run_dir)}\n"
            "the same command resumes from there",
            flush=True,
        )
        raise KeyboardInterrupt
    print(
        f"run      {run_dir}\n{run_dir.result_name:8} {run_dir.result}\nloss     {run_dir.loss_plot}\n"
        f"mlflow   run {run.tracker.run_id}\n"
        f"         mlflow ui --backend-store-uri {redact_uri(run.tracker.uri)}",
        flush=True,
    )


def send_missing(config: TrainConfig, run_dir: RunDir, group: str | None = None) -> None:
    """Send what the tracking stores lack of a finished run. group: that of the run in Weights & Biases."""
    manifest = run_dir.result.child(MANIFEST).read_bytes() or b"{}"
    run_id = json.loads(manifest)["extra"]["mlflow_run"]
    run_dir.path.download(exclude="checkpoints/*")
    target = wandb_target(config, run_dir, run_id, group)
    RunTracking(run_dir, absolute_uri(config.services.mlflow_uri), run_id, target, print).finish(
        run_dir.result.local
    )


def _newest_checkpoint(run_dir: RunDir) -> str:
    return str(run_dir.checkpoints.child(checkpoint_names(run_dir.checkpoints)[-1]))
