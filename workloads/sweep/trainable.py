"""The function that Ray Tune runs for every trial: it starts or resumes one training run."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from parallelmind.config import TrainConfig
from parallelmind.crash_report import crash_line
from parallelmind.errors import UserError, UserNotice, first_line
from parallelmind.model.manifest import MANIFEST
from parallelmind.remote import RemotePath
from parallelmind.storage import process_lock
from workloads.sweep.config import SweepConfig
from workloads.train.conclude import close_tracker
from workloads.train.data_files import DataFiles
from workloads.train.fit import fit
from workloads.train.prepare import SharedRunContext, prepare
from workloads.train.provenance import save_loss_plot
from workloads.train.same_name import find_run_dir

TRIALS = "trials"  # folder of the trials' runs in the sweep's folder


@dataclass(frozen=True, slots=True)
class SweepContext:
    """What all trials of a sweep share. parent_run_id: the sweep's MLflow run."""

    config: SweepConfig
    sweep_dir: RemotePath
    parent_run_id: str
    max_concurrent: int

    def trial_config(self, number: int, settings: dict[str, Any]) -> TrainConfig:
        """The configuration of a trial's run. Raises UserError if training rejects the settings."""
        return self.config.trial_config(number, settings, self.sweep_dir.child(TRIALS).location)


def run_trial(trial: dict[str, Any], context: SweepContext) -> None:
    """Train one trial and report to Ray Tune where it runs, its metrics, and how it ended.

    trial: `number`, `settings` and `data`, which is the fingerprint that the data must have
        (`PreparedRun.data_fingerprint`), or None.

    An error of the training is reported and not raised: Ray Tune repeats trials that raise. A trial whose
    process is lost is repeated.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        config = context.trial_config(trial["number"], trial["settings"])
        tune.report(_train(config, context, trial["data"]))
    except UserError as error:
        tune.report({"status": "failed", "error": first_line(error)})
    except Exception as error:
        tune.report({"status": "failed", "error": crash_line(error)})


def _report_restart(line: str) -> None:
    tune.report({"restart": line})


def _train(config: TrainConfig, context: SweepContext, data: str | None) -> dict[str, Any]:
    """Train the run, unless it is complete; returns the last report."""
    run_dir = find_run_dir(config)
    # A process that Ray Tune considers lost may still train in this folder: wait for it.
    with process_lock(run_dir.path.local / ".lock"):
        manifest = run_dir.result.child(MANIFEST).read_bytes()
        if manifest is not None:  # the run finished before the sweep received its last report
            extra = json.loads(manifest)["extra"]
            tune.report({"folder": run_dir.path.location, "run_id": extra["mlflow_run"]})
            return {"status": "finished", "step": extra["step"], "metrics": extra["metrics"]}
        shared = SharedRunContext(context.parent_run_id, context.sweep_dir.local.name, data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserNotice)  # the driver has printed it
            files = DataFiles.find(config.data)
        run = prepare(config, run_dir, files, shared=shared)
        tune.report(
            {"folder": run_dir.path.location, "run_id": run.tracker.run_id, "data": run.data_fingerprint}
        )
        with close_tracker(run.tracker) as set_outcome:
            outcome = fit(
                run, context.config.resources.cpus_per_trial, [TuneReportCallback()], _report_restart
            )
            set_outcome(outcome)
        if not outcome.finished:
            save_loss_plot(run_dir)
    status = "finished" if outcome.finished else "interrupted"
    return {"status": status, "step": outcome.step, "metrics": outcome.metrics}
