"""What Ray Tune runs for every trial: one training run, gone on with if it was begun before."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import workloads.ray_env  # noqa: F401  (before Ray)

# isort: split
from filelock import FileLock
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from parallelmind.config import TrainConfig
from parallelmind.data.files import find_files
from parallelmind.errors import UserError, first_line
from parallelmind.model.manifest import MANIFEST
from workloads.record import draw_losses
from workloads.sweep_config import SweepConfig
from workloads.train import result_folder, run_folder
from workloads.train_driver import Share, begin, ended, prepare
from workloads.train_fit import fit


@dataclass(frozen=True, slots=True)
class Sweep:
    """What all trials share. folder: the sweep's. parent: its MLflow run. slots: trials at a time."""

    config: SweepConfig
    folder: str
    parent: str
    slots: int

    def trial(self, number: int, settings: dict[str, Any]) -> TrainConfig:
        return self.config.trial(number, settings, str(Path(self.folder) / "trials"))


def run_trial(chosen: dict[str, Any], sweep: Sweep) -> None:
    """Train with `chosen["settings"]` and tell Ray Tune: where, every report of the training, and how it ended.

    An error of the training is told, not raised: Ray Tune would repeat it. What is lost with its process is repeated.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        tune.report(_trained(sweep.trial(chosen["number"], chosen["settings"]), sweep))
    except Exception as error:
        if not isinstance(error, UserError):
            logging.getLogger(__name__).exception("trial %d", chosen["number"])
        tune.report({"status": "failed", "error": first_line(error)})


def _trained(config: TrainConfig, sweep: Sweep) -> dict[str, Any]:
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # a process that was given up for lost may still be there
        manifest = result_folder(config, folder) / MANIFEST
        if manifest.is_file():  # it ended, and the sweep before it heard of it
            note = json.loads(manifest.read_text(encoding="utf-8"))["extra"]
            tune.report({"folder": str(folder), "run_id": note["mlflow_run"]})
            return {"status": "finished", "step": note["step"], "metrics": note["metrics"]}
        vocabulary = begin(config, folder)
        files, held_out = find_files(config.data_path), find_files(config.validation_path) if config.validation_path else []
        task, tracker = prepare(config, folder, files, held_out, vocabulary, Share(sweep.slots, sweep.parent))
        tune.report({"folder": str(folder), "run_id": tracker.run_id})
        with ended(tracker) as end:
            outcome = fit(task, files, sweep.slots, [TuneReportCallback()])
            end(outcome)
        draw_losses(tracker, folder / "loss.png")
        tracker.log_file(folder / "loss.png")
    status = "finished" if outcome.finished else "interrupted"
    return {"status": status, "step": outcome.step, "metrics": outcome.metrics}
