"""Train an adapter, on this machine or on a Ray cluster.

    python -m workloads.train EXPERIMENT|CONFIG.yaml [key=value …]

EXPERIMENT is a file in experiments/ (demo, experiments/demo.py) whose config() returns the settings;
CONFIG.yaml is any file of settings, such as the config.yaml of an earlier run. The run's folder is
output_dir/name-hash. The same command again resumes an interrupted run from its newest checkpoint, and leaves
a finished one as it is. Ctrl-C saves a checkpoint first.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from filelock import Timeout

from parallelmind import cli
from parallelmind.config import TrainConfig
from parallelmind.config.yaml_file import yaml_values
from parallelmind.data.files import find_files
from parallelmind.errors import UserError, format_value, write_error
from parallelmind.model.manifest import MANIFEST
from parallelmind.remote import RemotePath
from parallelmind.storage import process_lock
from workloads.common.read_config import read_config

# In a run's folder.
CHECKPOINTS, STOP, ADAPTER, MODEL, QUARANTINE = "checkpoints", "STOP", "adapter", "model", "quarantine.jsonl"
_UNWRITABLE = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        cli.print_help(__doc__ or "", TrainConfig)
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    run_training(read_config(TrainConfig, argv))


def run_training(config: TrainConfig) -> RemotePath:
    """Train `config` to the end, unless that is done already; returns the run's folder.

    Raises UserError for what the user can mend, and KeyboardInterrupt when stopped, with a checkpoint saved.
    """
    place = run_place(config)
    result = result_place(config, place)
    if result.child(MANIFEST).read_bytes():
        print(f"finished before: {result}; change a field or the name to train another")
        return place
    _refuse_changed(config)
    files = find_files(config.data.data_path)
    held_out = (
        find_files(config.data.validation_path, "validation_path") if config.data.validation_path else []
    )
    with alone_at(place, config.run.name, config.run.output_dir), ThreadPoolExecutor(1) as beside:
        from workloads.common import cluster

        connecting = beside.submit(cluster.connect, config.services.ray_address)
        from workloads.train.driver import (
            execute,  # imports torch and MLflow, which takes as long as Ray to start
        )

        execute(config, place, files, held_out, connecting.result)
    return place


@contextmanager
def alone_at(place: RemotePath, name: str, output_dir: str) -> Iterator[None]:
    """The only process in the folder of a run or sweep, which is made if need be.

    Raises UserError, naming `name`, if another one is there, and, naming `output_dir`, where nothing can be
    written.
    """
    try:
        with process_lock(place.local / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise UserError(
            f"name={name}: another process is at work in {place}; wait for it, or choose another name"
        ) from error
    except OSError as error:
        if not is_unwritable(error):
            raise
        raise write_error("output_dir", output_dir, error) from error


def is_unwritable(error: BaseException) -> bool:
    """Whether a file could not be written: for want of room, of permission, or of a folder where it should
    go.
    """
    return isinstance(error, OSError) and error.errno in _UNWRITABLE


def run_place(config: TrainConfig) -> RemotePath:
    """`output_dir/name-hash`."""
    return RemotePath.at(config.run.output_dir).child(f"{config.run.name}-{config.fingerprint()[:8]}")


def result_place(config: TrainConfig, place: RemotePath) -> RemotePath:
    """Where a finished run leaves what it trained."""
    return place.child(ADAPTER if config.optimizer.tuning == "lora" else MODEL)


def _refuse_changed(config: TrainConfig) -> None:
    """Raises UserError, naming the fields, if an unfinished run of the same name was begun with other
    settings.
    """
    ours, runs, place = (
        config.model_dump(mode="json"),
        RemotePath.at(config.run.output_dir),
        run_place(config),
    )
    for left in [runs.child(name) for name in runs.list_names() if name.startswith(f"{config.run.name}-")]:
        settings = left.child("config.yaml").read_bytes()
        if left == place or settings is None:
            continue
        begun = yaml_values(settings, f"{left}/config.yaml")
        begun_there = any(name.startswith("step-") for name in left.child(CHECKPOINTS).list_names())
        if begun.get("name") != config.run.name or not begun_there:
            continue
        if not any(left.child(name).child(MANIFEST).read_bytes() for name in (ADAPTER, MODEL)):
            fields = [
                name
                for name, value in begun.items()
                if name in ours and name not in config.NON_IDENTITY_FIELDS and ours[name] != value
            ]
            told = ", ".join(
                f"{name}={format_value(begun[name])} (now {format_value(ours[name])})" for name in fields
            )
            raise UserError(
                f"name={config.run.name}: the unfinished run {left} has {told}; "
                "give it these values to go on with it, choose another name, or remove its folder"
            )
