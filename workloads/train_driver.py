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

import workloads.ray_env  # noqa: F401  (before Ray)

# isort: split
import ray.train
from ray.train.torch import TorchTrainer

from parallelmind.config import BaseConfig, DataConfig, TrainConfig, save_yaml
from parallelmind.data.pipeline import start_feeder, survey
from parallelmind.data.survey import Survey, write_quarantine
from parallelmind.errors import UserError
from parallelmind.model.base import load_structure, load_tokenizer
from parallelmind.model.support import refuse_unsupported
from parallelmind.tracking import Tracker, absolute_uri
from parallelmind.training import checkpoint
from parallelmind.training.loop import Outcome
from workloads import cluster
from workloads.train import ADAPTER, CHECKPOINTS, QUARANTINE, STOP
from workloads.train_worker import Task, run_worker

_RESTARTS = 3  # how often lost workers are replaced before the run is given up
_SHOWN_BAD_LINES, _SHOWN_KEYS = 10, 5


def execute(config: TrainConfig, folder: Path, files: list[str], held_out: list[str]) -> None:
    """Check the data, start Ray, train, and say where everything is. See `workloads.train.run_training` for what it raises."""
    save_yaml(config, folder / "config.yaml")
    (folder / STOP).unlink(missing_ok=True)
    base = config.part(BaseConfig)
    vocabulary = len(load_tokenizer(base))
    if config.patch_rope:
        refuse_unsupported(load_structure(base))
    cluster.connect(config.ray_address)
    if config.use_gpu:
        cluster.require_gpus(config.num_workers)
    found = _survey(config, folder, files, held_out, vocabulary)
    tracker = _tracker(config, folder)
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, int(cluster.cpus()) // config.num_workers)
    task = Task(config, folder, tuple(held_out), tracker.uri, tracker.run_id, planned_steps(config, found), threads)
    tracker.set_tags({"bad_lines": len(found.bad), "folder": folder})
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


def planned_steps(config: TrainConfig, found: Survey) -> int:
    """About how many optimizer steps the run takes."""
    steps = max(1, math.ceil(found.batches(config) / (config.num_workers * config.accumulation_steps))) * config.epochs
    return steps if config.max_steps is None else min(steps, config.max_steps)


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


def _tracker(config: TrainConfig, folder: Path) -> Tracker:
    """The run's MLflow run: begun once, gone on with after an interruption."""
    note = folder / "run.json"
    known = json.loads(note.read_text(encoding="utf-8"))["mlflow_run"] if note.is_file() else None
    tracker = Tracker.start(absolute_uri(config.mlflow_uri), config.mlflow_experiment, folder.name, config, known)
    note.write_text(json.dumps({"mlflow_run": tracker.run_id}) + "\n", encoding="utf-8")
    tracker.log_file(folder / "config.yaml")
    return tracker


def _fit(task: Task, files: list[str]) -> Outcome:
    """Ray Train, again from the newest checkpoint where workers were lost. An error that a worker raised is final."""
    data, base = task.config.part(DataConfig), task.config.part(BaseConfig)
    for restart in range(_RESTARTS + 1):
        _keep_newest(task.folder / CHECKPOINTS, task.config.fingerprint())
        feeder = start_feeder(files, data, base, task.config.seed, task.config.num_workers)
        try:
            result = _trainer(task, feeder).fit()
        except ray.train.WorkerGroupError as error:
            causes = list(error.worker_failures.values())
            if user_error := next((cause for cause in map(_root, causes) if isinstance(cause, UserError)), None):
                raise user_error from error
            if restart == _RESTARTS or not any(isinstance(_root(cause), ray.exceptions.RayError) for cause in causes):
                raise
            print(f"lost a worker; starting again ({restart + 1} of {_RESTARTS})", file=sys.stderr, flush=True)
        else:
            outcome = result.return_value  # type: ignore[attr-defined]  # Ray types its V1 classes
            assert isinstance(outcome, Outcome)
            return outcome
        finally:
            ray.kill(feeder)
    raise AssertionError("the last restart returns or raises")


def _root(error: BaseException) -> BaseException:
    """What a worker raised, under Ray's wrappers."""
    while (inner := getattr(error, "_base_exc", None) or getattr(error, "health_check_failure", None)) is not None:
        error = inner
    return error


def _trainer(task: Task, feeder: Any) -> TorchTrainer:
    config = task.config
    # Half of the CPUs at most: the readers of Ray Data need some too, or everything waits for ever.
    share = max(0.01, round(min(0.5, cluster.cpus() / (2 * config.num_workers)), 2))
    return TorchTrainer(
        functools.partial(run_worker, task, feeder),  # type: ignore[arg-type]
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": share, "GPU": int(config.use_gpu)},
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=CHECKPOINTS,
            storage_path=str(task.folder),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.keep_checkpoints),
            # An error comes back to the driver with its traceback; Ray would print that a second time.
            logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
        ),
    )


def _keep_newest(folder: Path, config_hash: str) -> None:
    """Leave only the newest whole checkpoint, and no record of Ray's, which a crash may have cut short."""
    kept = checkpoint.newest(folder, config_hash)
    for item in folder.iterdir() if folder.is_dir() else ():
        if item.is_dir() and item != kept:
            shutil.rmtree(item)
        elif item.is_file():
            item.unlink()


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
    if not outcome.finished:
        saved = checkpoint.newest(task.folder / CHECKPOINTS, task.config.fingerprint())
        print(f"stopped at step {outcome.step}; checkpoint: {saved}\nthe same command goes on from there", flush=True)
        raise KeyboardInterrupt
    print(f"run      {task.folder}\nadapter  {task.folder / ADAPTER}\nmlflow   run {tracker.run_id}")
    print(f"         mlflow ui --backend-store-uri {tracker.uri}", flush=True)
