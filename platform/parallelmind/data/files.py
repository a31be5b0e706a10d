"""Find the files of a data path, and divide them into parts that are read in parallel."""

from __future__ import annotations

import glob
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from parallelmind.errors import UserError, UserNotice, first_line, format_value
from parallelmind.remote import is_uri, resolve_filesystem
from parallelmind.storage import expand_home, similar_path

DATA_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".arrow")  # of files with parallel records
COMPRESSIONS = (".gz", ".zst")
_MIN_PART_BYTES, _MAX_PART_BYTES = 1 << 20, 1 << 26  # of uncompressed JSONL
# Planning a part takes milliseconds in one process, so parts grow with the corpus to stay within this number.
_TARGET_PARTS = 1 << 14
_BUFFER_BYTES = 1 << 16
_MAX_NAMED = 5  # skipped files
_MAX_COMMAS = 32  # in one path
_ARROW_FILE = b"ARROW1"  # how an Arrow IPC file starts, and a stream does not


class FileFormat(NamedTuple):
    """The endings of a file's name in lower case, as (`.jsonl`, `.gz`); "" for each that it lacks."""

    suffix: str
    compression: str

    @classmethod
    def of(cls, file: str) -> FileFormat:
        name = file.split("?")[0] if file.startswith(("http://", "https://")) else file
        stem, last = os.path.splitext(os.path.basename(name).lower())
        return cls(os.path.splitext(stem)[1], last) if last in COMPRESSIONS else cls(last, "")

    @property
    def is_parquet(self) -> bool:
        return self == (".parquet", "")

    @property
    def is_arrow(self) -> bool:
        return self == (".arrow", "")

    @property
    def is_divisible(self) -> bool:
        """Whether the file is lines of text that can be read from any byte on."""
        return not (self.compression or self.is_parquet or self.is_arrow)

    def is_one_of(self, suffixes: Sequence[str]) -> bool:
        """Whether the file can be read as one with these suffixes. Files of rows are never compressed."""
        return self.suffix in suffixes and not (self.compression and self.suffix in (".parquet", ".arrow"))


@dataclass(frozen=True, slots=True)
class FilePart:
    """A range of one file: bytes start..end of plain JSONL, row groups start..end of Parquet.

    A compressed file is one part, and so is an Arrow file.
    """

    file: str
    start: int
    end: int


def find_files(path: str, field: str = "data_path", suffixes: Sequence[str] = DATA_SUFFIXES) -> list[str]:
    """All files of a data path, in a fixed order without duplicates.

    path: a file, a folder, a glob, a URL of any of these, or several separated by commas. A path that exists
    is taken as it is, whatever its characters. suffixes: of the files to take from a folder; a UserNotice
    tells which others it holds. Raises UserError that names `field` if a path matches no file, or a file is
    not readable.
    """
    files = [file for item in _split(path) for file in _find(item, field, suffixes)]
    if not files:
        raise UserError(f"{field}={format_value(path)}: names no file; give parallel JSONL or Parquet")
    return list(dict.fromkeys(files))


def _split(path: str) -> Iterator[str]:
    """The paths in a list separated by commas. An existing path may have commas in it."""
    pieces = path.split(",")
    while pieces:
        item, length = _next_item(pieces)
        if item:
            yield item
        pieces = pieces[length:]


def _next_item(pieces: Sequence[str]) -> tuple[str, int]:
    """The longest existing path at the start, else the first piece; and the number of its pieces."""
    for length in range(min(len(pieces), _MAX_COMMAS + 1), 0, -1):
        item = ",".join(pieces[:length])
        if existing := next(filter(_exists, (item, item.strip())), None):
            return existing, length
    return pieces[0].strip(), 1


def _exists(path: str) -> bool:
    """Whether a local path exists, or the folder with commas before its last name, or a URL with commas."""
    if not is_uri(path):
        folder, name = os.path.split(expand_home(path))
        has_folder = "," in folder and "," not in name and os.path.isdir(folder)
        return has_folder or os.path.lexists(expand_home(path))
    if "," not in path or path.count("://") > 1:
        return False
    try:
        filesystem, inner = resolve_filesystem(path)
        return bool(filesystem.exists(inner))
    except (OSError, ValueError, ImportError):  # `_find` reports the reason
        return False


def _find(path: str, field: str, suffixes: Sequence[str]) -> list[str]:
    location = path if is_uri(path) else str(Path(expand_home(path)).absolute())
    others: list[str] = []
    try:
        filesystem, inner = resolve_filesystem(location)
        if filesystem.isfile(inner):
            files = [inner]
        elif filesystem.isdir(inner):
            files, others = _list_folder(filesystem, inner, suffixes)
        else:
            files = _glob(filesystem, inner)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{field}={path}: cannot be reached ({first_line(error)}); check address and credentials"
        ) from error
    if not files:
        hint = f" among {_names(others)}" if others else "" if is_uri(path) else similar_path(location)
        raise UserError(
            f"{field}={path}: no such file{hint}; give a file, a glob, or a folder with files that end in "
            f"{', '.join(suffixes)}"
        )
    if others:
        notice = f"reads {len(files)} files of this folder and skips {len(others)}: {_names(others)}"
        warnings.warn(f"{field}={path}: {notice}", UserNotice, stacklevel=4)
    if is_uri(location):
        return [filesystem.unstrip_protocol(file) for file in files]
    if unreadable := [file for file in files if not os.access(file, os.R_OK)]:
        raise UserError(f"{field}={unreadable[0]}: not readable; give it read permission")
    return files


def _list_folder(filesystem: Any, folder: str, suffixes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Paths of the files with one of the suffixes, and the names of everything else, both sorted."""
    files, others = [], []
    for entry in filesystem.ls(folder, detail=True):
        path = entry["name"].rstrip("/")
        if _is_file(entry) and FileFormat.of(path).is_one_of(suffixes):
            files.append(path)
        else:
            others.append(PurePosixPath(path).name + ("/" if entry["type"] == "directory" else ""))
    return sorted(files), sorted(others)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (", …" if len(names) > _MAX_NAMED else "")


def _is_file(entry: dict[str, Any]) -> bool:
    return entry["type"] == "file" or bool(entry.get("islink") and os.path.isfile(entry["name"]))


def _glob(filesystem: Any, pattern: str) -> list[str]:
    """The files that a glob matches, sorted. The folders in front of it that exist are taken as they are."""
    if not glob.has_magic(pattern):
        return []
    folder, _, name = pattern.rpartition("/")
    while glob.has_magic(folder) and not filesystem.isdir(folder):
        folder, _, last = folder.rpartition("/")
        name = f"{last}/{name}"
    matches = filesystem.glob(f"{glob.escape(folder)}/{name}", detail=True)
    return sorted(path for path, entry in matches.items() if _is_file(entry))


def open_file(file: str) -> BinaryIO:
    """Open a file for reading.

    Raises UserError if it was removed after `find_files` found it, or cannot be read, also from the file that
    is returned: what its content raises as an OSError is damage.
    """
    with _explain_missing(file):
        return io.BufferedReader(_CheckedFile(_open_raw(file), file), _BUFFER_BYTES)


def _open_raw(file: str) -> Any:
    if not is_uri(file):
        return open(file, "rb", buffering=0)
    filesystem, inner = resolve_filesystem(file)
    return filesystem.open(inner, "rb")


class _CheckedFile(io.RawIOBase):
    """A file whose OSErrors, of a disk or a network, are a UserError."""

    def __init__(self, stream: Any, file: str) -> None:
        self._stream, self._file = stream, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._stream.seekable())

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self._stream.readinto(buffer))
        except OSError as error:
            reason = error.strerror or first_line(error) or type(error).__name__
            raise UserError(
                f"data_path={self._file}: cannot be read ({reason}); check the disk or the network, and run "
                "the same command again"
            ) from error

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def close(self) -> None:
        self._stream.close()
        super().close()


@contextmanager
def _explain_missing(file: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        reason = error.strerror or first_line(error)
        raise UserError(
            f"data_path={file}: was found before and can no longer be read ({reason}); restore it"
        ) from error


def file_parts(files: Sequence[str], field: str = "data_path") -> list[FilePart]:
    """Parts that cover the files, in order. The same files always give the same parts.

    Raises UserError that names `field` for a .parquet file that is not Parquet.
    """
    sizes = {file: _size(file) for file in files}
    part_bytes = min(_MAX_PART_BYTES, max(_MIN_PART_BYTES, sum(sizes.values()) // _TARGET_PARTS))
    return [part for file in files for part in _parts(file, sizes[file], part_bytes, field)]


def total_bytes(files: Sequence[str]) -> int:
    """Bytes of the files as stored; compressed files count with their compressed size."""
    return sum(map(_size, files))


def _size(file: str) -> int:
    with _explain_missing(file):
        filesystem, inner = resolve_filesystem(file)
        return int(filesystem.size(inner))


def _parts(file: str, size: int, part_bytes: int, field: str) -> list[FilePart]:
    file_format = FileFormat.of(file)
    if file_format.is_parquet:
        return [FilePart(file, group, group + 1) for group in range(_row_groups(file, field))]
    if file_format.is_arrow:
        with _explain_bad_rows(file, field, "an Arrow file or stream"), open_file(file) as stream:
            open_arrow(stream)
    if not file_format.is_divisible:
        return [FilePart(file, 0, size)] if size else []
    return [FilePart(file, start, min(start + part_bytes, size)) for start in range(0, size, part_bytes)]


def _row_groups(file: str, field: str) -> int:
    with _explain_bad_rows(file, field, "a Parquet file"), open_file(file) as stream:
        return int(pq.ParquetFile(stream).num_row_groups)


@contextmanager
def _explain_bad_rows(file: str, field: str, expected: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{field}={file}: cannot be read ({first_line(error)}); check that it is {expected}"
        ) from error


def open_arrow(stream: BinaryIO) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow IPC file or stream. Raises OSError or ArrowException if it is neither.

    `datasets` writes streams under the same ending.
    """
    start = stream.read(len(_ARROW_FILE))
    stream.seek(0)
    if start != _ARROW_FILE:
        return iter(pa.ipc.open_stream(stream))
    reader = pa.ipc.open_file(stream)
    return map(reader.get_batch, range(reader.num_record_batches))
