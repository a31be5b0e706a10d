"""Folders at a URI (s3://…, gs://…, any that fsspec or pyarrow knows), and the working copy that each machine
has of one.

What is at the URI is the truth. An object there is whole or not there; of a folder one file is written last
and vouches for the rest.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, cast

import fsspec
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper

from parallelmind.errors import UserError, first_line
from parallelmind.storage import atomic_binary_file, cache_dir, process_lock

_BLOCK = 1 << 24  # bytes copied at a time
_FULL = {errno.EDQUOT, errno.ENOSPC}


def is_uri(path: str | Path) -> bool:
    return "://" in str(path)


def resolve_filesystem(place: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URI, and the path in it. What fsspec lacks a driver for, pyarrow may
    have.
    """
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(place))
    except ImportError:
        system, inner = pyarrow.fs.FileSystem.from_uri(place)
        return ArrowFSWrapper(system), inner


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or folder, and where it lies for all machines; without a URI it lies nowhere else, and nothing
    is copied.

    field: how the user has named it. Every method raises UserError with it where the URI cannot be reached.
    """

    local: Path
    uri: str | None = None
    field: str = "output_dir"

    @classmethod
    def at(cls, path: str | Path, field: str = "output_dir") -> RemotePath:
        """The folder that a path or URI means. Working copies have the same path on all machines."""
        if not is_uri(path):
            return cls(Path(path).expanduser().absolute(), None, field)
        uri = str(path).rstrip("/")
        return cls(cache_dir() / "copies" / uri.replace("://", "/"), uri, field)

    def child(self, name: str) -> RemotePath:
        """A file or folder in this one."""
        return RemotePath(self.local / name, self.uri and f"{self.uri}/{name}", self.field)

    def __str__(self) -> str:
        return self.uri or str(self.local)

    def read_bytes(self) -> bytes | None:
        """What this file holds, None where it is not."""
        if self.uri is None:
            return self.local.read_bytes() if self.local.is_file() else None
        with self._reached() as (system, inner):
            return bytes(system.cat_file(inner)) if system.isfile(inner) else None

    def list_names(self) -> list[str]:
        """Of the files and folders in this folder."""
        if self.uri is None:
            return sorted(path.name for path in self.local.glob("*"))
        with self._reached() as (system, inner):
            found = system.ls(inner, detail=False) if system.isdir(inner) else ()
            return sorted({PurePosixPath(path).name for path in found})

    def upload(self, last: str | None = None) -> None:
        """Copy this file, or what this folder holds but for hidden files, to the URI. last: the file that
        follows all others.
        """
        if self.uri is None:
            return
        files = _visible(self.local) if self.local.is_dir() else {"": self.local}
        with self._reached() as (system, inner):
            for name in sorted(files, key=lambda name: (name == last, name)):
                target = PurePosixPath(inner, name)
                system.makedirs(str(target.parent), exist_ok=True)
                system.put_file(str(files[name]), str(target))

    def download(self, exclude: str = "", last: str | None = None) -> None:
        """Make this folder hold the files that are at the URI, and no others but hidden ones.

        exclude: a pattern of files that stay as they are. last: the file that follows all others.
        """
        if self.uri is None:
            return
        with self._reached() as (system, inner):
            there = {str(PurePosixPath(file).relative_to(inner)): file for file in system.find(inner)}
            for name, path in _visible(self.local).items():
                if name not in there:
                    path.unlink(missing_ok=True)
            for name in sorted(there, key=lambda name: (name == last, name)):
                if not fnmatch(name, exclude):
                    with (
                        atomic_binary_file(self.local / name) as copy,
                        system.open(there[name], "rb") as source,
                    ):
                        shutil.copyfileobj(source, copy, _BLOCK)

    def pyarrow_filesystem(self) -> tuple[str, pyarrow.fs.FileSystem | None]:
        """Path and filesystem of this folder, for libraries that ask for pyarrow's; None is this
        machine's.
        """
        if self.uri is None:
            return str(self.local), None
        with self._reached() as (system, inner):
            if isinstance(system, ArrowFSWrapper):
                return inner, system.fs
            return inner, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(system))

    def delete(self) -> None:
        """Remove this folder, here and there."""
        shutil.rmtree(self.local, ignore_errors=True)
        self.delete_remote()

    def delete_remote(self) -> None:
        """At the URI alone."""
        if self.uri is None:
            return
        with self._reached() as (system, inner):
            if system.exists(inner):
                system.rm(inner, recursive=True)

    @contextmanager
    def _reached(self) -> Iterator[tuple[Any, str]]:
        try:
            system, inner = resolve_filesystem(str(self.uri))
            system.invalidate_cache()
            yield system, inner.rstrip("/")
        except (OSError, ValueError, ImportError) as error:
            what, remedy = "cannot be reached", "check address and credentials"
            if getattr(error, "errno", None) in _FULL:
                what, remedy = (
                    "a disk is full",
                    f"make room there, and for the copy on this machine, {self.local}",
                )
            raise UserError(f"{self.field}={self.uri}: {what} ({first_line(error)}); {remedy}") from error


def fetch_cached(path: str | Path, note: str, field: str) -> Path:
    """The folder that a path or URI means, copied here first if its file `note` is another than the one that
    is here.

    Raises UserError, naming `field`, where it cannot be reached or has no such file.
    """
    if not is_uri(path):
        return Path(path)
    mirror = RemotePath.at(path, field)
    with process_lock(mirror.local / ".lock"):
        there = mirror.child(note).read_bytes()
        if there is None:
            raise UserError(f"{field}={path}: holds no {note}; give the folder that a run wrote")
        if RemotePath(mirror.local / note).read_bytes() != there:
            mirror.download(last=note)
    return mirror.local


def _visible(folder: Path) -> dict[str, Path]:
    """The files under a folder by their path in it, but for hidden ones and those in hidden folders."""
    names = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in names.items()
        if not any(part.startswith(".") for part in name.parts)
    }
