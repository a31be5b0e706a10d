"""Folders and files that are there whole or not at all, and the checksums that tell whether they still
are.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO, cast

_SCRATCH = "-part-"  # in the names of folders that are being written


def cache_dir() -> Path:
    """`$PARALLELMIND_CACHE` or `~/.cache/parallelmind`."""
    root = os.environ.get("PARALLELMIND_CACHE")
    return Path(root or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/parallelmind").expanduser()


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hex. Raises OSError if it cannot be read."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync_dir(folder: Path) -> None:
    """Put a folder and the files in it, not those of its subfolders, on the disk."""
    for path in (*folder.iterdir(), folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def remove_partial_dirs(parent: Path) -> None:
    """Remove what writers of whole folders left behind in `parent` when they were killed. None may be at work
    there.
    """
    for left in parent.glob(f".*{_SCRATCH}*"):
        shutil.rmtree(left)


@contextmanager
def atomic_dir(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; at the end it is flushed and takes the name `folder`, in place of what had it.

    After an exception `folder` is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}{_SCRATCH}") as scratch:
        built = Path(scratch) / "new"
        built.mkdir()
        yield built
        fsync_dir(built)
        _replace(folder, built, Path(scratch) / "old")
        _fsync(folder.parent)


def _replace(folder: Path, built: Path, old: Path) -> None:
    """Rename `built` to `folder`; what was there is moved away first, and back if that fails."""
    if folder.exists():
        folder.rename(old)
    try:
        built.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[TextIO]:
    """UTF-8 text to write, compressed where `path` ends in .gz; otherwise as `atomic_binary_file`."""
    with atomic_binary_file(path) as file:
        # Without name and time in its header, the same records give the same bytes.
        packed = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.name.endswith(".gz") else file
        with io.TextIOWrapper(cast(BinaryIO, packed), encoding="utf-8", newline="\n") as text:
            yield text


@contextmanager
def atomic_binary_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write; at the end it is flushed and takes the name `path`.

    After an exception `path` is as it was. Raises OSError where the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(scratch, "wb") as file:
            yield file
        _fsync(scratch)
        os.replace(scratch, path)
        _fsync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)
