"""Run folder: its name, its files, its lock, and the check for changed settings."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from filelock import Timeout

from parallelmind.config import TrainConfig
from parallelmind.config.yaml_file import yaml_values
from parallelmind.errors import UserError, format_value, write_error
from parallelmind.model.manifest import MANIFEST
from parallelmind.redaction import redact_values
from parallelmind.remote import RemotePath
from parallelmind.storage import process_lock
from workloads.common.stopping import StopFile

ADAPTER, MODEL = "adapter", "model"  # folder of the result: of an adapter, of a whole model
_CHECKPOINTS, _STOP = "checkpoints", "STOP"

_WRITE_ERRORS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EFBIG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


@dataclass(frozen=True, slots=True)
class RunDir:
    """Folder of one run, on this machine or at a URI. result_name: `adapter` or `model`."""

    path: RemotePath
    result_name: str

    @classmethod
    def of(cls, config: TrainConfig) -> RunDir:
        """`output_dir/name-hash`."""
        name = f"{config.run.name}-{config.fingerprint()[:8]}"
        path = RemotePath.at(config.run.output_dir).child(name)
        return cls(path, ADAPTER if config.optimizer.tuning == "lora" else MODEL)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.local.name

    @property
    def result(self) -> RemotePath:
        """Folder of the trained adapter or model; it appears when the run is finished."""
        return self.path.child(self.result_name)

    @property
    def checkpoints(self) -> RemotePath:
        return self.path.child(_CHECKPOINTS)

    @property
    def config_file(self) -> RemotePath:
        return self.path.child("config.yaml")

    @property
    def record_file(self) -> RemotePath:
        """File with the key of the MLflow run and the fingerprint of the data."""
        return self.path.child("run.json")

    @property
    def quarantine_file(self) -> RemotePath:
        """File of the bad records, which training skips."""
        return self.path.child("quarantine.jsonl")

    @property
    def metrics_file(self) -> RemotePath:
        """File with every logged metric."""
        return self.path.child("metrics.jsonl")

    @property
    def unsent_file(self) -> RemotePath:
        """File that lists what MLflow lacks; it exists if there is anything."""
        return self.path.child("unsent.json")

    @property
    def loss_plot(self) -> RemotePath:
        return self.path.child("loss.png")

    @property
    def ray_storage(self) -> RemotePath:
        """Folder of Ray Train's own state."""
        return self.path.child(".ray")

    def stop_file(self) -> StopFile:
        return stop_file(self.path)

    def is_finished(self) -> bool:
        return bool(self.result.child(MANIFEST).read_bytes())


def stop_file(run_path: RemotePath) -> StopFile:
    """The file that asks a run to save a checkpoint and end."""
    return StopFile(run_path.child(_STOP))


@contextmanager
def lock_dir(path: RemotePath, name: str, output_dir: str) -> Iterator[None]:
    """Hold the lock of the folder of a run or sweep, which is created if it does not exist.

    Raises:
        UserError: another process holds the lock, or a file cannot be written, here or in the with block.
    """
    try:
        with process_lock(path.local / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise UserError(
            f"name={name}: another process uses {path}; wait for it, or choose another name"
        ) from error
    except OSError as error:
        if not is_write_error(error):
            raise
        raise write_error("output_dir", output_dir, error) from error


def is_write_error(error: BaseException) -> bool:
    """Whether a file could not be written: disk full, no permission, or a file where a folder is needed."""
    return isinstance(error, OSError) and error.errno in _WRITE_ERRORS


def check_no_changed_run(config: TrainConfig, run_dir: RunDir) -> None:
    """Refuse a run if an unfinished run of the same name has other settings.

    Raises:
        UserError: names the fields that differ.
    """
    runs = run_dir.path.parent
    for name in runs.list_names():
        other = runs.child(name)
        if not name.startswith(f"{config.run.name}-") or other == run_dir.path:
            continue
        started_with = _unfinished_settings(other)
        if started_with is None or started_with.get("name") != config.run.name:
            continue
        raise UserError(
            f"name={config.run.name}: the unfinished run {other} has {_differences(started_with, config)}; "
            "use its values to resume it, choose another name, or remove its folder"
        )


def _unfinished_settings(path: RemotePath) -> dict[str, object] | None:
    """The settings of an unfinished run that has a checkpoint, or None."""
    content = path.child("config.yaml").read_bytes()
    if content is None:
        return None
    settings = yaml_values(content, f"{path}/config.yaml")
    has_checkpoint = any(name.startswith("step-") for name in path.child(_CHECKPOINTS).list_names())
    finished = any(RunDir(path, result_name).is_finished() for result_name in (ADAPTER, MODEL))
    return settings if has_checkpoint and not finished else None


def _differences(started_with: dict[str, object], config: TrainConfig) -> str:
    """The settings that differ. A run of an earlier version has later fields at their defaults."""
    fields, current = config.flat_fields(), redact_values(config.model_dump(mode="json"))
    earlier = {name: fields[name].default for name in config.later_fields()}
    started_with = earlier | redact_values(started_with)
    return ", ".join(
        f"{name}={format_value(value)} (now {format_value(current[name])})"
        for name, value in started_with.items()
        if name in current and name not in config.NON_IDENTITY_FIELDS and current[name] != value
    )
