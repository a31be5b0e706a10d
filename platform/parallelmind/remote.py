"""Files and folders at a URI that fsspec or pyarrow supports, with a local copy on each machine.

The content at the URI is authoritative. A single object there is complete or absent. For a folder, one marker
file is copied last, so that its presence proves that the folder is complete.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any, cast

import fsspec
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper
from fsspec.implementations.local import LocalFileSystem

from parallelmind.errors import UserError, first_line
from parallelmind.redaction import redact_uri
from parallelmind.storage import atomic_binary_file, cache_dir, expand_home, process_lock

_COPY_BYTES = 1 << 24  # copied at a time
_DISK_FULL = {errno.EDQUOT, errno.ENOSPC}


def is_uri(path: str | Path) -> bool:
    return "://" in str(path)


def resolve_filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URI, and the path within it.

    A local path is taken as it is. For a protocol that fsspec has no driver for, it is pyarrow's filesystem.
    """
    if not is_uri(path):
        return LocalFileSystem(), path  # fsspec would give `::` in a path a meaning
    try:
        return cast(tuple[Any, str], fsspec.core.url_to_fs(path))
    except ImportError:
        filesystem, inner = pyarrow.fs.FileSystem.from_uri(path)
        return ArrowFSWrapper(filesystem), inner


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or folder at a URI and its local copy. Without a URI it is local only, and nothing is copied.

    local: the path on this machine. uri: where all machines find it. field: the config field that names it.
    Every method raises UserError that names `field` if the URI cannot be reached.
    """

    local: Path
    uri: str | None = None
    field: str = "output_dir"

    @classmethod
    def at(cls, path: str | Path, field: str = "output_dir") -> RemotePath:
        """The RemotePath of a local path or a URI, whose local copy has the same path on all machines."""
        if not is_uri(path):
            return cls(Path(expand_home(str(path))).absolute(), None, field)
        uri = str(path).rstrip("/")
        return cls(cache_dir() / "copies" / redact_uri(uri).replace("://", "/"), uri, field)

    def child(self, name: str) -> RemotePath:
        """A file or folder in this folder."""
        return RemotePath(self.local / name, self.uri and f"{self.uri}/{name}", self.field)

    @property
    def parent(self) -> RemotePath:
        """The folder that holds this file or folder."""
        return RemotePath(self.local.parent, self.uri and self.uri.rpartition("/")[0], self.field)

    @property
    def location(self) -> str:
        """The URI, or the local path."""
        return self.uri or str(self.local)

    def __str__(self) -> str:
        """`location` as it is shown: without passwords."""
        return redact_uri(self.location)

    def read_bytes(self) -> bytes | None:
        """The content of this file at the URI, or None if it does not exist."""
        if self.uri is None:
            return self.local.read_bytes() if self.local.is_file() else None
        with self._open_remote() as (filesystem, inner):
            return bytes(filesystem.cat_file(inner)) if filesystem.isfile(inner) else None

    def write_bytes(self, content: bytes) -> None:
        """Replace the content of this file at the URI as a whole; needs a URI, and makes no local copy."""
        with self._open_remote() as (filesystem, inner):
            if isinstance(filesystem, LocalFileSystem):
                with atomic_binary_file(Path(inner)) as file:
                    file.write(content)
            else:
                filesystem.makedirs(str(PurePosixPath(inner).parent), exist_ok=True)
                filesystem.pipe_file(inner, content)

    def list_names(self) -> list[str]:
        """Sorted names of the files and folders in this folder at the URI."""
        if self.uri is None:
            return sorted(path.name for path in self.local.glob("*"))
        with self._open_remote() as (filesystem, inner):
            paths = filesystem.ls(inner, detail=False) if filesystem.isdir(inner) else ()
            return sorted({PurePosixPath(path).name for path in paths})

    def total_bytes(self) -> int:
        """Total size of the files in this folder at the URI."""
        if self.uri is None:
            return sum(path.stat().st_size for path in self.local.rglob("*") if path.is_file())
        with self._open_remote() as (filesystem, inner):
            return int(filesystem.du(inner))

    def upload(self, last: str | None = None) -> None:
        """Copy this file, or all files of this folder except hidden ones, to the URI.

        last: name of the marker file, which is copied after all others.
        """
        if self.uri is None:
            return
        files = _visible_files(self.local) if self.local.is_dir() else {"": self.local}
        with self._open_remote() as (filesystem, inner):
            for name in _with_last(files, last):
                _put_file(filesystem, files[name], PurePosixPath(inner, name))

    def download(self, exclude: str = "", last: str | None = None) -> None:
        """Make the local folder equal to the folder at the URI: copy its files and delete all others.

        Hidden local files stay. exclude: pattern of files to leave unchanged. last: name of the marker file,
        which is copied after all others.
        """
        if self.uri is None:
            return
        with self._open_remote() as (filesystem, inner):
            sources = {str(PurePosixPath(file).relative_to(inner)): file for file in filesystem.find(inner)}
            for name, path in _visible_files(self.local).items():
                if name not in sources:
                    path.unlink(missing_ok=True)
            for name in _with_last(sources, last):
                if fnmatch(name, exclude):
                    continue
                with (
                    atomic_binary_file(self.local / name) as copy,
                    filesystem.open(sources[name], "rb") as source,
                ):
                    shutil.copyfileobj(source, copy, _COPY_BYTES)

    def pyarrow_filesystem(self) -> tuple[str, pyarrow.fs.FileSystem | None]:
        """Path and pyarrow filesystem of this folder; None is the local filesystem."""
        if self.uri is None:
            return str(self.local), None
        with self._open_remote() as (filesystem, inner):
            if isinstance(filesystem, ArrowFSWrapper):
                return inner, filesystem.fs
            return inner, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))

    def delete(self) -> None:
        """Delete this folder, locally and at the URI."""
        shutil.rmtree(self.local, ignore_errors=True)
        self.delete_remote()

    def delete_remote(self) -> None:
        """Delete this file or folder at the URI only."""
        if self.uri is None:
            return
        with self._open_remote() as (filesystem, inner):
            if filesystem.exists(inner):
                filesystem.rm(inner, recursive=True)

    @contextmanager
    def _open_remote(self) -> Iterator[tuple[Any, str]]:
        """The filesystem of the URI and the path within it. Errors inside the block become UserError."""
        try:
            filesystem, inner = resolve_filesystem(str(self.uri))
            filesystem.invalidate_cache()
            yield filesystem, inner.rstrip("/")
        except (OSError, ValueError, ImportError) as error:
            problem, remedy = "cannot be reached", "check address and credentials"
            if getattr(error, "errno", None) in _DISK_FULL:
                problem = "a disk is full"
                remedy = f"make room there, and for the local copy, {self.local}"
            raise UserError(f"{self.field}={self.uri}: {problem} ({first_line(error)}); {remedy}") from error


def fetch_cached(path: str | Path, marker: str, field: str) -> Path:
    """The local folder of a path or URI. A URI is downloaded unless the local copy has the same marker file.

    marker: name of the file that is written last. Raises UserError that names `field` if the URI cannot be
    reached or has no marker file.
    """
    if not is_uri(path):
        return Path(path)
    remote = RemotePath.at(path, field)
    with process_lock(remote.local / ".lock"):
        remote_marker = remote.child(marker).read_bytes()
        if remote_marker is None:
            raise UserError(f"{field}={path}: holds no {marker}; give the folder that a run wrote")
        if RemotePath(remote.local / marker).read_bytes() != remote_marker:
            remote.download(last=marker)
    return remote.local


def _put_file(filesystem: Any, file: Path, target: PurePosixPath) -> None:
    """Copy a local file. A file system, unlike an object store, would show a copy that is not complete."""
    if isinstance(filesystem, LocalFileSystem):
        with atomic_binary_file(Path(target)) as copy, open(file, "rb") as source:
            shutil.copyfileobj(source, copy, _COPY_BYTES)
    else:
        filesystem.makedirs(str(target.parent), exist_ok=True)
        filesystem.put_file(str(file), str(target))


def _with_last(names: Iterable[str], last: str | None) -> list[str]:
    """The names in order, `last` at the end."""
    return sorted(names, key=lambda name: (name == last, name))


def _visible_files(folder: Path) -> dict[str, Path]:
    """All files under a folder by their relative path, without hidden files and files in hidden folders."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        name.as_posix(): path
        for name, path in files.items()
        if not any(part.startswith(".") for part in name.parts)
    }
