"""One training run, from checked data to a finished adapter: what the driver does, with Ray Train doing the
work.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from uuid import uuid4

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
from parallelmind.config import TrainConfig
from parallelmind.config.yaml_file import save_yaml
from parallelmind.data.pipeline import estimate_epoch_batches, survey_files
from parallelmind.data.survey import Survey, write_quarantine
from parallelmind.errors import UserError
from parallelmind.model.base_model import load_meta_model, load_tokenizer
from parallelmind.model.manifest import read_adapter
from parallelmind.model.support import check_supported
from parallelmind.remote import RemotePath
from parallelmind.storage import atomic_file
from parallelmind.tracking import Tracker, absolute_uri
from parallelmind.training import checkpoint
from parallelmind.training.outcome import Outcome
from workloads.common import resources
from workloads.common.stopping import StopFile, run_stoppable
from workloads.train.command import CHECKPOINTS, QUARANTINE, STOP, result_place
from workloads.train.fit import fit
from workloads.train.provenance import LOSSES, code_version, keep_losses
from workloads.train.worker import Task

_SHOWN_BAD_LINES, _SHOWN_KEYS = 10, 5


@dataclass(frozen=True, slots=True)
class SharedRunContext:
    """What a run is a part of. runs: that share the cluster. parent: MLflow run that it is a child of.

    data: `PreparedRun.data` of the others, where any is known.
    """

    runs: int = 1
    parent: str | None = None
    data: str | None = None


ALONE = SharedRunContext()


class PreparedRun(NamedTuple):
    """data: fingerprints of what is trained on and, if given, of what is held out."""

    task: Task
    tracker: Tracker
    data: str


def execute(
    config: TrainConfig,
    place: RemotePath,
    files: list[str],
    held_out: list[str],
    connected: Callable[[], None],
) -> None:
    """Check model and data, train, and say where everything is. See `workloads.train.run_training` for what
    it raises.

    connected: waits for Ray.
    """
    vocabulary = begin(config, place)
    connected()
    task, tracker, _ = prepare(config, place, files, held_out, vocabulary)
    with ended(tracker) as end:
        stop = StopFile(place.child(STOP))
        outcome = run_stoppable(
            lambda: fit(task, files), stop.request, "stopping after this step, with a checkpoint"
        )
        end(outcome)
    _conclude(task, outcome, tracker)


def begin(config: TrainConfig, place: RemotePath) -> int:
    """Fetch what is known of the run and put the settings on record; returns how many token ids there are.

    Raises UserError for a model or adapter of others.
    """
    place.download(exclude="*.safetensors")
    settings = place.child("config.yaml")
    save_yaml(config, settings.local)
    settings.upload()
    StopFile(place.child(STOP)).clear()
    base = config.model
    vocabulary = len(load_tokenizer(base))
    if config.rope.patch_rope:
        check_supported(load_meta_model(base))
    if config.optimizer.resume_adapter is not None:
        asked = {
            **config.rope.model_dump(),
            **config.lora.model_dump(exclude={"lora_dropout"}),
        }
        read_adapter(config.optimizer.resume_adapter).check_settings(asked)
    return vocabulary


def prepare(
    config: TrainConfig,
    place: RemotePath,
    files: list[str],
    held_out: list[str],
    vocabulary: int,
    share: SharedRunContext = ALONE,
) -> PreparedRun:
    """Read all data once, and open the MLflow run.

    Raises UserError for bad data, for other data than the runs beside this one have, and for GPUs that are
    not there.
    """
    if config.workers.use_gpu:
        resources.require_gpus(config.workers.num_workers)
    found, data = _survey(config, place, files, held_out, vocabulary)
    if share.data not in (None, data):
        paths = f"data_path={config.data.data_path}" + (
            f" or validation_path={config.data.validation_path}" if held_out else ""
        )
        raise UserError(
            f"{paths}: the records are not those of the trials before; restore them, or choose another name"
        )
    tracker = _tracker(config, place, found.fingerprint, share.parent)
    threads = resources.threads_per_process(config.workers.num_workers * share.runs)
    per_epoch = estimate_epoch_batches(found, config.data, config.model, config.optimizer.seed)
    task = Task(config, place, tuple(held_out), tracker.uri, tracker.run_id, per_epoch, threads)
    tracker.set_tags(
        {"bad_lines": len(found.bad), "folder": place, "data_sha256": found.fingerprint, **code_version()}
    )
    return PreparedRun(task, tracker, data)


@contextmanager
def ended(tracker: Tracker) -> Iterator[Callable[[Outcome], None]]:
    """Close the MLflow run as what its outcome was, or the exception in its place."""
    status = "FAILED"

    def end(outcome: Outcome) -> None:
        nonlocal status
        status = "FINISHED" if outcome.finished else "KILLED"

    try:
        yield end
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)


def _survey(
    config: TrainConfig, place: RemotePath, files: list[str], held_out: list[str], vocabulary: int
) -> tuple[Survey, str]:
    """Check every line of every file before training; what is bad is printed and written to the run's
    quarantine.

    Returns what was found to train on, and the fingerprints of all (`PreparedRun.data`).
    """
    found = survey_files(files, config.data, vocabulary)
    bad, data = list(found.bad), found.fingerprint
    if held_out:
        compared = survey_files(held_out, config.data, vocabulary, "validation_path")
        bad, data = bad + compared.bad, f"{data} {compared.fingerprint}"
    for line in bad[:_SHOWN_BAD_LINES]:
        print(f"left out: {line}", file=sys.stderr)
    where = place.child(QUARANTINE)
    write_quarantine(where.local, bad)
    where.upload()
    if bad:
        print(
            f"bad lines left out: {len(bad)}, all in {where}; strict=true stops at the first", file=sys.stderr
        )
    ignored = "".join(
        f", key {key!r} ignored in {count}" for key, count in found.unknown_keys.most_common(_SHOWN_KEYS)
    )
    print(
        f"data: {found.records} records, {found.branches} branches, {len(found.bad)} bad lines{ignored}",
        flush=True,
    )
    return found, data


def _tracker(config: TrainConfig, place: RemotePath, data: str, parent: str | None = None) -> Tracker:
    """The run's MLflow run: begun once, gone on with after an interruption. Raises UserError if the data has
    changed since.
    """
    note = place.child("run.json")
    if note.local.is_file():
        known = json.loads(note.local.read_text(encoding="utf-8"))
    else:  # on the disk before the run begins: a run whose begin is cut short is found by this key
        known = {"mlflow_key": uuid4().hex, "data_sha256": data}
    if known["data_sha256"] != data and checkpoint.written(place.child(CHECKPOINTS)):
        raise UserError(
            f"data_path={config.data.data_path}: its records are not those that {place} was begun on "
            f"({data}, not {known['data_sha256']}); restore them, or choose another name"
        )
    with atomic_file(note.local) as file:
        file.write(json.dumps({**known, "data_sha256": data}) + "\n")
    note.upload()
    uri = absolute_uri(config.services.mlflow_uri)
    tracker = Tracker.start(
        uri, config.services.mlflow_experiment, place.local.name, config, known["mlflow_key"], parent
    )
    tracker.log_file(place.child("config.yaml").local)
    return tracker


def _conclude(task: Task, outcome: Outcome, tracker: Tracker) -> None:
    place = task.place
    StopFile(place.child(STOP)).clear()
    if not outcome.finished:
        keep_losses(place, tracker)
        saved = place.child(CHECKPOINTS)
        saved = saved.child(checkpoint.written(saved)[-1])
        print(
            f"stopped at step {outcome.step}; checkpoint: {saved}\nthe same command goes on from there",
            flush=True,
        )
        raise KeyboardInterrupt
    result = result_place(task.config, place)
    print(
        f"run      {place}\n{result.local.name:8} {result}\nloss     {place.child(LOSSES)}\nmlflow   run {tracker.run_id}"
    )
    print(f"         mlflow ui --backend-store-uri {tracker.uri}", flush=True)
