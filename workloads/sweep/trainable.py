"""The function that Ray Tune runs for every trial: it starts or resumes one training run."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
from filelock import FileLock
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from parallelmind.config import TrainConfig
from parallelmind.data.files import find_files
from parallelmind.errors import UserError, first_line
from parallelmind.model.manifest import MANIFEST
from parallelmind.remote import RemotePath
from workloads.sweep.config import SweepConfig
from workloads.train.command import result_place, run_place
from workloads.train.driver import SharedRunContext, begin, ended, prepare
from workloads.train.fit import fit
from workloads.train.provenance import keep_losses


@dataclass(frozen=True, slots=True)
class SweepContext:
    """What all trials of a sweep share. parent_run_id: the sweep's MLflow run."""

    config: SweepConfig
    sweep_dir: RemotePath
    parent_run_id: str
    max_concurrent: int

    def trial_config(self, number: int, settings: dict[str, Any]) -> TrainConfig:
        """The configuration of a trial's run. Raises UserError if training rejects the settings."""
        return self.config.trial_config(number, settings, str(self.sweep_dir.child("trials")))


def run_trial(trial: dict[str, Any], context: SweepContext) -> None:
    """Train one trial and report to Ray Tune where it runs, its metrics, and how it ended.

    trial: `number`, `settings` and `data`, the fingerprint that the data must have (`PreparedRun.data`) or
    None. An error of the training is reported and not raised: Ray Tune repeats trials that raise. A trial
    whose process is lost is repeated.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        config = context.trial_config(trial["number"], trial["settings"])
        tune.report(_train(config, context, trial["data"]))
    except Exception as error:
        if not isinstance(error, UserError):
            logging.getLogger(__name__).exception("trial %d failed", trial["number"])
        tune.report({"status": "failed", "error": first_line(error)})


def _train(config: TrainConfig, context: SweepContext, data: str | None) -> dict[str, Any]:
    """Train the run, unless it is complete; returns the last report."""
    run_dir = run_place(config)
    run_dir.local.mkdir(parents=True, exist_ok=True)
    # A process that Ray Tune considers lost may still train in this folder: wait for it.
    with FileLock(run_dir.local / ".lock"):
        manifest = result_place(config, run_dir).child(MANIFEST).read_bytes()
        if manifest is not None:  # the run finished before the sweep received its last report
            extra = json.loads(manifest)["extra"]
            tune.report({"folder": str(run_dir), "run_id": extra["mlflow_run"]})
            return {"status": "finished", "step": extra["step"], "metrics": extra["metrics"]}
        vocabulary = begin(config, run_dir)
        files = find_files(config.data.data_path)
        held_out = (
            find_files(config.data.validation_path, "validation_path") if config.data.validation_path else []
        )
        shared = SharedRunContext(context.max_concurrent, context.parent_run_id, data)
        task, tracker, data = prepare(config, run_dir, files, held_out, vocabulary, shared)
        tune.report({"folder": str(run_dir), "run_id": tracker.run_id, "data": data})
        with ended(tracker) as end:
            outcome = fit(task, files, context.max_concurrent, [TuneReportCallback()])
            end(outcome)
        if not outcome.finished:
            keep_losses(run_dir, tracker)
    status = "finished" if outcome.finished else "interrupted"
    return {"status": status, "step": outcome.step, "metrics": outcome.metrics}
