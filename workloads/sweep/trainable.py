"""What Ray Tune runs for every trial: one training run, gone on with if it was begun before."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from parallelmind.config import TrainConfig
from parallelmind.data.files import find_files
from parallelmind.errors import UserError, first_line
from parallelmind.model.manifest import MANIFEST
from parallelmind.remote import RemotePath
from parallelmind.storage import process_lock
from workloads.sweep.config import SweepConfig
from workloads.train.command import result_place, run_place
from workloads.train.driver import SharedRunContext, begin, ended, prepare
from workloads.train.fit import fit
from workloads.train.provenance import keep_losses


@dataclass(frozen=True, slots=True)
class Sweep:
    """What all trials share. place: the sweep's folder. parent: its MLflow run. slots: trials at a time."""

    config: SweepConfig
    place: RemotePath
    parent: str
    slots: int

    def trial(self, number: int, settings: dict[str, Any]) -> TrainConfig:
        return self.config.trial(number, settings, str(self.place.child("trials")))


def run_trial(chosen: dict[str, Any], sweep: Sweep) -> None:
    """Train with `chosen["settings"]` and tell Ray Tune: where, every report of the training, and how it
    ended.

    `chosen["data"]`: which data it must be, if that is known (`Prepared.data`).

    An error of the training is told, not raised: Ray Tune would repeat it. What is lost with its process is
    repeated.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        tune.report(_trained(sweep.trial(chosen["number"], chosen["settings"]), sweep, chosen["data"]))
    except Exception as error:
        if not isinstance(error, UserError):
            logging.getLogger(__name__).exception("trial %d", chosen["number"])
        tune.report({"status": "failed", "error": first_line(error)})


def _trained(config: TrainConfig, sweep: Sweep, data: str | None) -> dict[str, Any]:
    place = run_place(config)
    with process_lock(place.local / ".lock"):  # a process that was given up for lost may still be there
        manifest = result_place(config, place).child(MANIFEST).read_bytes()
        if manifest is not None:  # it ended, and the sweep before it heard of it
            note = json.loads(manifest)["extra"]
            tune.report({"folder": str(place), "run_id": note["mlflow_run"]})
            return {"status": "finished", "step": note["step"], "metrics": note["metrics"]}
        vocabulary = begin(config, place)
        files = find_files(config.data.data_path)
        held_out = (
            find_files(config.data.validation_path, "validation_path") if config.data.validation_path else []
        )
        share = SharedRunContext(sweep.slots, sweep.parent, data)
        task, tracker, data = prepare(config, place, files, held_out, vocabulary, share)
        tune.report({"folder": str(place), "run_id": tracker.run_id, "data": data})
        with ended(tracker) as end:
            outcome = fit(task, files, sweep.slots, [TuneReportCallback()])
            end(outcome)
        if not outcome.finished:
            keep_losses(place, tracker)
    status = "finished" if outcome.finished else "interrupted"
    return {"status": status, "step": outcome.step, "metrics": outcome.metrics}
