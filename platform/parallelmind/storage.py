"""Folders that are there whole or not at all, and the checksums that tell whether they still are."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hex. Raises OSError if it cannot be read."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(folder: Path) -> None:
    """Put the files of a folder, not those of its subfolders, on the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; at the end it is flushed and takes the name `folder`, in place of what had it.

    After an exception `folder` is as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        built = Path(scratch) / "new"
        built.mkdir()
        yield built
        flush(built)
        _replace(folder, built, Path(scratch) / "old")


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
