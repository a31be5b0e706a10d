"""Checkpoints of a run: list them, choose one to resume from, and write new ones in the background."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from parallelmind.errors import UserError, first_line
from parallelmind.remote import RemotePath
from parallelmind.storage import process_lock, remove_partial_dirs
from parallelmind.training.checkpoint import STATE_FILE, Snapshot, read_state, write_checkpoint
from parallelmind.training.sharded_checkpoint import write_shards

_PREFIX = "step-"


def checkpoint_names(folder: RemotePath) -> list[str]:
    """Names of the checkpoint folders, oldest first, complete or not."""
    return sorted((name for name in folder.list_names() if _step_of(name) >= 0), key=_step_of)


def checkpoint_dirs(folder: Path) -> list[Path]:
    """Checkpoint folders on this machine, oldest first, complete or not."""
    return [folder / name for name in checkpoint_names(RemotePath(folder))]


def newest_checkpoint(folder: Path, config_hash: str) -> Path | None:
    """The newest complete checkpoint of this configuration."""
    return next((path for path in reversed(checkpoint_dirs(folder)) if _is_usable(path, config_hash)), None)


def download_checkpoint(checkpoint: RemotePath) -> Path:
    """The folder of a checkpoint on this machine, downloaded unless the same one is here already."""
    if checkpoint.uri is not None:
        with process_lock(checkpoint.local.parent / ".bringing"):  # one worker of each machine downloads
            state_file = RemotePath(checkpoint.local / STATE_FILE)
            local_state = state_file.read_bytes() if read_state(checkpoint.local) else None
            if local_state is None or local_state != checkpoint.child(STATE_FILE).read_bytes():
                checkpoint.download(last=STATE_FILE)
    return checkpoint.local


def _is_usable(folder: Path, config_hash: str) -> bool:
    state = read_state(folder)
    return state is not None and state.config_hash == config_hash


def _step_of(name: str) -> int:
    """The step in the name of a checkpoint folder; -1 for any other name."""
    step = name.removeprefix(_PREFIX)
    return int(step) if step != name and step.isdecimal() else -1


class CheckpointWriter:
    """Writes the checkpoints of a run in a background thread.

    As it is, for the workers other than rank 0 of a sharded run, which write their parts. path: folder of the
    checkpoints; at a URI, the checkpoints there are the valid ones.
    """

    def __init__(self, path: RemotePath) -> None:
        self.path, self.folder = path, path.local
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Start writing a checkpoint, after the previous one. Raises UserError if the previous one failed."""
        self.wait()
        self._pending = self._thread.submit(self._write, snapshot)

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises:
            UserError: it could not be written; names the complete ones.
        """
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except (OSError, SafetensorError) as error:
            complete = ", ".join(folder.name for folder in checkpoint_dirs(self.folder)) or "none"
            raise UserError(
                f"{self.path.field}: a checkpoint cannot be written in {self.path} ({first_line(error)}; "
                f"complete ones: {complete}); make room there, and run the same command to resume"
            ) from error

    def close(self) -> None:
        """Wait as `wait` does, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, snapshot: Snapshot) -> None:
        write_shards(snapshot, self._target(snapshot))

    def _target(self, snapshot: Snapshot) -> RemotePath:
        return self.path.child(f"{_PREFIX}{snapshot.state.step}")


class CheckpointManager(CheckpointWriter):
    """The checkpoints of a run on rank 0, as the only process that creates and deletes in their folder.

    keep: number of the newest checkpoints to keep, in addition to the best one.
    """

    def __init__(self, path: RemotePath, keep: int) -> None:
        self._lock = process_lock(path.local / ".writer")
        self._lock.acquire()  # waits for a writer that was presumed dead
        remove_partial_dirs(path.local)
        super().__init__(path)
        self._keep = keep

    def resume(self, config_hash: str, print_line: Callable[[str], None]) -> Path | None:
        """The newest complete checkpoint of this configuration; newer ones are renamed and reported."""
        self._download_newest(config_hash)
        newest = newest_checkpoint(self.folder, config_hash)
        for folder in checkpoint_dirs(self.folder):
            if newest is None or _step_of(folder.name) > _step_of(newest.name):
                aside = folder.with_name(f"damaged-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                self.path.child(folder.name).delete_remote()
                print_line(f"{folder} is damaged or has other settings; renamed to {aside.name}")
        return newest

    def _download_newest(self, config_hash: str) -> None:
        """Download the newest complete checkpoint, and the damaged ones after it, from a URI.

        A checkpoint that exists on this machine only was never finished and is removed.
        """
        if self.path.uri is None:
            return
        names = checkpoint_names(self.path)
        for folder in checkpoint_dirs(self.folder):
            if folder.name not in names:
                shutil.rmtree(folder)
        for name in reversed(names):
            if _is_usable(download_checkpoint(self.path.child(name)), config_hash):
                return

    def close(self) -> None:
        """Wait as `wait` does, and release the lock."""
        try:
            super().close()
        finally:
            self._lock.release()

    def _write(self, snapshot: Snapshot) -> None:
        target = self._target(snapshot)
        if snapshot.is_sharded:
            write_shards(snapshot, target)
        else:
            write_checkpoint(snapshot, target.local)
            target.upload(last=STATE_FILE)
        best = f"{_PREFIX}{snapshot.state.best_step}"
        for old in checkpoint_names(self.path)[: -self._keep]:
            if old != best:
                shutil.rmtree(self.folder / old, ignore_errors=self.path.uri is not None)
                self.path.child(old).delete_remote()
