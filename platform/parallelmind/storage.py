"""Crash-safe files and folders: atomic replacement, whole lines, locks between processes, checksums."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TextIO, cast
from uuid import uuid4

from filelock import BaseFileLock, FileLock, lock_descriptor

_MAX_COMPARED_NAMES = 10_000
_PARTIAL_MARK = "-part-"  # part of the name of every folder that `atomic_dir` is still filling


def cache_dir() -> Path:
    """Cache folder of this machine: `$PARALLELMIND_CACHE` or `~/.cache/parallelmind`."""
    root = os.environ.get("PARALLELMIND_CACHE")
    return Path(expand_home(root or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/parallelmind"))


def expand_home(path: str) -> str:
    """The path with a leading `~` or `~user` as that home folder; any other path unchanged.

    A file whose name starts with `~` is itself, and so is the name of an unknown user.
    """
    is_file_name = not path.startswith("~/") and path != "~" and os.path.lexists(path)
    return path if is_file_name else os.path.expanduser(path)


def similar_path(path: str) -> str:
    """` (did you mean …?)` with the name beside a missing path that is most similar, or an empty string."""
    missing = Path(path).absolute()
    if os.path.lexists(missing):
        return ""
    while not os.path.lexists(missing.parent):
        missing = missing.parent
    try:
        names = [entry.name for entry in islice(os.scandir(missing.parent), _MAX_COMPARED_NAMES)]
    except OSError:  # no folder, or not readable
        return ""
    similar = difflib.get_close_matches(missing.name, names, n=1)
    return f" (did you mean {missing.parent / similar[0]}?)" if similar else ""


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hex. Raises OSError if the file cannot be read."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync_tree(folder: Path) -> None:
    """Flush a folder to disk: every file and subfolder in it, then the folder itself."""
    for path in (*sorted(folder.rglob("*"), reverse=True), folder):  # a subfolder follows its content
        fsync(path)


def fsync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def process_lock(lock_file: Path, timeout: float = -1) -> BaseFileLock:
    """Lock that one process holds at a time, to be used in a `with` statement.

    Creates the folder of `lock_file`. timeout: seconds to wait for the lock, without limit if negative.
    Raises filelock.Timeout after that time.
    """
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(lock_file, timeout=timeout)


@contextmanager
def try_lock_path(path: Path) -> Iterator[bool]:
    """Lock an existing file or folder itself. Yields False if another process holds the lock."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield lock_descriptor(descriptor, blocking=False)
    finally:
        os.close(descriptor)  # releases the lock


def remove_partial_dirs(parent: Path) -> None:
    """Remove the partial folders that killed `atomic_dir` writers left in `parent`.

    No writer may be active in `parent`.
    """
    for partial in parent.glob(f".*{_PARTIAL_MARK}*"):
        shutil.rmtree(partial)


@contextmanager
def partial_dir(parent: Path | None) -> Iterator[Path]:
    """Yield an empty folder, which is removed at the end or, after a kill, by `remove_partial_dirs`.

    parent: by default the system's folder for temporary files.
    """
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{_PARTIAL_MARK}") as scratch:
        yield Path(scratch)


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill. On success it is flushed to disk and replaces `folder` by one rename.

    Its files have the mode that the umask gives. After an exception `folder` is unchanged. Of a symbolic link
    the target is replaced.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}{_PARTIAL_MARK}") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        _apply_umask(new, Path(scratch) / "probe")
        fsync_tree(new)
        _replace_dir(folder, new, Path(scratch) / "old")
        fsync(folder.parent)


def _apply_umask(folder: Path, probe: Path) -> None:
    """Give every file in `folder` the mode of a new file; safetensors creates files with mode 0600.

    probe: path of a file to create and remove. Reading the umask itself would change it for other threads.
    """
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _replace_dir(folder: Path, new: Path, old: Path) -> None:
    """Rename `new` to `folder`, and an existing `folder` to `old`.

    If the first rename fails, the existing `folder` is moved back.
    """
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


@contextmanager
def atomic_binary_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file to write. On success it is flushed to disk and replaces `path` by one rename.

    After an exception `path` is unchanged. Of a symbolic link the target is replaced. Raises OSError if the
    file cannot be written.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid4().hex}.part")  # as other hosts write to the folder, too
    try:
        with open(partial, "xb") as file:
            yield file
        fsync(partial)
        os.replace(partial, path)
        fsync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """Like `atomic_binary_file`, for UTF-8 text. The file is compressed if `path` ends in .gz."""
    with atomic_binary_file(path) as file:
        # An empty name and time in the gzip header make equal records give equal bytes.
        raw = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.name.endswith(".gz") else file
        with io.TextIOWrapper(cast(BinaryIO, raw), encoding="utf-8", newline="\n") as text:
            yield text


def write_line(path: Path, end: int, line: bytes, sync: bool) -> int:
    """Write a line at the end of a file of whole lines, which is created if needed; returns the new end.

    end: bytes of all whole lines. What follows them is a part of a line that could not be written; it is cut.
    sync: flush the line to disk. Raises OSError if the line cannot be written; the file then ends at `end`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with open(descriptor, "r+b") as file:
            file.truncate(end)
            file.seek(end)
            file.write(line)
            if sync:
                file.flush()
                os.fsync(descriptor)
    except BaseException:
        os.truncate(path, end)
        raise
    return end + len(line)
