"""One training run, from checked data to a finished adapter: what the driver does, with Ray Train doing the work."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import workloads.ray_env  # noqa: F401  (before Ray)

# isort: split
import ray.train
import torch.distributed
from ray.train.torch import TorchTrainer

from parallelmind.config import BaseConfig, DataConfig, LoraConfig, RopeConfig, TrainConfig, save_yaml
from parallelmind.data.pipeline import start_feeder, survey
from parallelmind.data.survey import Survey, write_quarantine
from parallelmind.errors import UserError, first_line
from parallelmind.model.base import load_structure, load_tokenizer
from parallelmind.model.manifest import read_adapter
from parallelmind.model.support import refuse_unsupported
from parallelmind.storage import whole_file
from parallelmind.tracking import Tracker, absolute_uri
from parallelmind.training import checkpoint
from parallelmind.training.loop import Outcome
from workloads import cluster
from workloads.record import code_version, draw_losses
from workloads.train import CHECKPOINTS, QUARANTINE, STOP, result_folder
from workloads.train_worker import Task, run_worker

_RESTARTS = 3  # how often what was lost is replaced, without a new checkpoint between, before the run is given up
_LOST = (ray.exceptions.RayError, ray.train.ControllerError, torch.distributed.DistError)
_RAY = ".ray"  # Ray Train's folder in the run's
_SHOWN_BAD_LINES, _SHOWN_KEYS = 10, 5


def execute(config: TrainConfig, folder: Path, files: list[str], held_out: list[str], connected: Callable[[], None]) -> None:
    """Check model and data, train, and say where everything is. See `workloads.train.run_training` for what it raises.

    connected: waits for Ray.
    """
    save_yaml(config, folder / "config.yaml")
    (folder / STOP).unlink(missing_ok=True)
    base = config.part(BaseConfig)
    vocabulary = len(load_tokenizer(base))
    if config.patch_rope:
        refuse_unsupported(load_structure(base))
    if config.resume_adapter is not None:
        asked = {**config.part(RopeConfig).model_dump(), **config.part(LoraConfig).model_dump(exclude={"lora_dropout"})}
        read_adapter(config.resume_adapter).refuse_other_settings(asked)
    connected()
    if config.use_gpu:
        cluster.require_gpus(config.num_workers)
    found = _survey(config, folder, files, held_out, vocabulary)
    tracker = _tracker(config, folder, found.fingerprint)
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, int(cluster.cpus()) // config.num_workers)
    per_epoch = max(1, math.ceil(found.batches(config)))
    task = Task(config, folder, tuple(held_out), tracker.uri, tracker.run_id, per_epoch, threads)
    tracker.set_tags({"bad_lines": len(found.bad), "folder": folder, "data_sha256": found.fingerprint, **code_version()})
    status = "FAILED"
    try:
        outcome = _stoppable(lambda: _fit(task, files), folder / STOP)
        status = "FINISHED" if outcome.finished else "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.finish(status)
    _conclude(task, outcome, tracker)


def _survey(config: TrainConfig, folder: Path, files: list[str], held_out: list[str], vocabulary: int) -> Survey:
    """Check every line of every file before training; what is bad is printed and written to the run's quarantine."""
    found = survey(files, config, vocabulary)
    bad = list(found.bad)
    if held_out:
        bad += survey(held_out, config, vocabulary, "validation_path").bad
    for line in bad[:_SHOWN_BAD_LINES]:
        print(f"malformed, left out: {line}", file=sys.stderr)
    write_quarantine(folder / QUARANTINE, bad)
    if bad:
        where = folder / QUARANTINE
        print(f"{len(bad)} malformed lines left out, all in {where}; strict=true stops at the first", file=sys.stderr)
    ignored = "".join(f", key {key!r} ignored in {count}" for key, count in found.extra.most_common(_SHOWN_KEYS))
    print(f"data: {found.records} records, {found.branches} branches, {len(found.bad)} malformed lines{ignored}", flush=True)
    return found


def _tracker(config: TrainConfig, folder: Path, data: str) -> Tracker:
    """The run's MLflow run: begun once, gone on with after an interruption. Raises UserError if the data has changed since."""
    note = folder / "run.json"
    if note.is_file():
        known = json.loads(note.read_text(encoding="utf-8"))
    else:  # on the disk before the run begins: a run whose begin is cut short is found by this key
        known = {"mlflow_key": uuid4().hex, "data_sha256": data}
    if known["data_sha256"] != data and checkpoint.by_step(folder / CHECKPOINTS):
        raise UserError(
            f"data_path={config.data_path}: its records are not those that {folder} was begun on "
            f"({data}, not {known['data_sha256']}); restore them, or choose another name"
        )
    with whole_file(note) as file:
        file.write(json.dumps({**known, "data_sha256": data}) + "\n")
    uri = absolute_uri(config.mlflow_uri)
    tracker = Tracker.start(uri, config.mlflow_experiment, folder.name, config, known["mlflow_key"])
    tracker.log_file(folder / "config.yaml")
    return tracker


def _fit(task: Task, files: list[str]) -> Outcome:
    """Ray Train, again from the newest checkpoint whenever a part of it was lost. An error that a worker raised is final."""
    config = task.config
    elastic = config.min_workers is not None and not config.use_gpu
    of_a_node = cluster.share_of_a_node(config.num_workers) if elastic else None
    lost, reached = 0, checkpoint.by_step(task.folder / CHECKPOINTS)
    while True:
        feeder = start_feeder(files, config.part(DataConfig), config.part(BaseConfig), config.seed, config.num_workers)
        try:
            result = _trainer(task, feeder, of_a_node or cluster.share(config.num_workers)).fit()
        except (ray.train.WorkerGroupError, ray.train.ControllerError, ray.exceptions.RayActorError) as error:
            before, reached = reached, checkpoint.by_step(task.folder / CHECKPOINTS)
            lost = lost + 1 if before == reached else 1
            _end_if_final(error, lost)
            what = "worker" if isinstance(error, ray.train.WorkerGroupError) else "controller"
            print(f"lost a {what}; starting again from the newest checkpoint", file=sys.stderr, flush=True)
        else:
            outcome = result.return_value  # type: ignore[attr-defined]  # Ray types its V1 classes
            assert isinstance(outcome, Outcome)
            return outcome
        finally:
            ray.kill(feeder)
            shutil.rmtree(task.folder / _RAY, ignore_errors=True)  # its notes of this start, which a crash may have cut short


def _end_if_final(error: Exception, lost: int) -> None:
    """Raise what cannot be mended by starting again. lost: how often in a row something was lost before a new checkpoint."""
    causes = [_root(cause) for cause in getattr(error, "worker_failures", {}).values()] or [error]
    if user_error := next((cause for cause in causes if isinstance(cause, UserError)), None):
        raise user_error from error
    if not any(map(_is_loss, causes)):
        raise error
    if lost > _RESTARTS:
        raise UserError(
            f"num_workers: lost {lost} times without a new checkpoint between ({first_line(causes[0])}); if memory ran out, "
            "lower batch_size, max_branches_per_sample or max_sample_tokens, or set gradient_checkpointing=true"
        ) from error


def _is_loss(error: BaseException) -> bool:
    """Whether it tells of a loss: of whatever raised it, or of another worker, for which gloo has no error of its own."""
    return isinstance(error, _LOST) or "gloo/transport" in str(error)


def _root(error: BaseException) -> BaseException:
    """What a worker raised, under Ray's wrappers."""
    while (inner := getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None)) is not None:
        error = inner
    return error


def _trainer(task: Task, feeder: Any, cpus: float) -> TorchTrainer:
    """cpus: of each worker."""
    config = task.config
    workers = config.num_workers if config.min_workers is None else (config.min_workers, config.num_workers)
    # Checkpoints are our own: written in the background, hashed, and passed over when damaged, which Ray's are not.
    return TorchTrainer(
        functools.partial(run_worker, task, feeder),  # type: ignore[arg-type]
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,  # type: ignore[arg-type]  # Ray types its V1 classes
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": cpus, "GPU": int(config.use_gpu)},
            placement_strategy="PACK" if config.use_gpu else "SPREAD",  # GPUs near each other, CPU workers on all nodes
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=_RAY,
            storage_path=str(task.folder),
            # An error comes back to the driver with its traceback; Ray would print that a second time.
            logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _stoppable(work: Callable[[], Outcome], stop_file: Path) -> Outcome:
    """Run `work` in a thread (so that Ray leaves our signal handlers alone). The first Ctrl-C or SIGTERM asks the workers
    to save and end, a second one ends at once."""
    done: list[Outcome] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    with _signals_to(stop_file):
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
    if failed:
        raise failed[0]
    return done[0]


@contextmanager
def _signals_to(stop_file: Path) -> Iterator[None]:
    def handle(number: int, frame: object) -> None:
        if stop_file.exists():
            raise KeyboardInterrupt
        stop_file.touch()
        print("stopping after this step, with a checkpoint; once more ends at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _conclude(task: Task, outcome: Outcome, tracker: Tracker) -> None:
    (task.folder / STOP).unlink(missing_ok=True)
    draw_losses(tracker, task.folder / "loss.png")
    tracker.log_file(task.folder / "loss.png")
    if not outcome.finished:
        saved = checkpoint.newest(task.folder / CHECKPOINTS, task.config.fingerprint())
        print(f"stopped at step {outcome.step}; checkpoint: {saved}\nthe same command goes on from there", flush=True)
        raise KeyboardInterrupt
    result = result_folder(task.config, task.folder)
    print(f"run      {task.folder}\n{result.name:8} {result}\nloss     {task.folder / 'loss.png'}\nmlflow   run {tracker.run_id}")
    print(f"         mlflow ui --backend-store-uri {tracker.uri}", flush=True)
