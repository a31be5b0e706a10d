"""Run folder: its name, its files and its lock."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from filelock import Timeout

from parallelmind.config import TrainConfig
from parallelmind.errors import UserError, write_error
from parallelmind.model.manifest import MANIFEST
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
    """Folder of one run, on this machine or at a URI.

    result_name: `adapter` or `model`. config_hash: of the settings; its first 8 digits end the folder's name.
    """

    path: RemotePath
    result_name: str
    config_hash: str

    @classmethod
    def of(cls, config: TrainConfig) -> RunDir:
        """`output_dir/name-hash`."""
        return cls._named(config, config.fingerprint())

    @classmethod
    def of_earlier_version(cls, config: TrainConfig) -> RunDir:
        """The folder of the run in versions that hashed other fields (`TrainConfig.earlier_fingerprint`)."""
        return cls._named(config, config.earlier_fingerprint())

    @classmethod
    def _named(cls, config: TrainConfig, config_hash: str) -> RunDir:
        path = RemotePath.at(config.run.output_dir).child(f"{config.run.name}-{config_hash[:8]}")
        return cls(path, ADAPTER if config.optimizer.tuning == "lora" else MODEL, config_hash)

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

    def unsent_file(self, store: str) -> RemotePath:
        """File that lists what a tracking store lacks; it exists if there is anything."""
        return self.path.child(f"unsent-{store}.json")

    def has_unsent(self) -> bool:
        """Whether a tracking store lacks anything of this run."""
        return any(name.startswith("unsent-") for name in self.path.list_names())

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

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, complete or not."""
        return any(name.startswith("step-") for name in self.checkpoints.list_names())


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
