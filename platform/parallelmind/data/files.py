"""Find the files of a data path, and divide them into parts that are read in parallel."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from parallelmind.errors import UserError, first_line, format_value
from parallelmind.remote import is_uri, resolve_filesystem
from parallelmind.storage import expand_home

DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_MIN_PART_BYTES, _MAX_PART_BYTES = 1 << 20, 1 << 26  # of uncompressed JSONL
# Planning a part takes milliseconds in one process, so parts grow with the corpus to stay within this number.
_TARGET_PARTS = 1 << 14


@dataclass(frozen=True, slots=True)
class FilePart:
    """A range of one file: bytes start..end of plain JSONL, row groups start..end of Parquet.

    A compressed file is one part.
    """

    file: str
    start: int
    end: int


def find_files(path: str, field: str = "data_path") -> list[str]:
    """All files of a data path, in a fixed order without duplicates.

    path: a file, a folder, a glob, a URL of any of these, or several separated by commas. Raises UserError
    that names `field` if one of them matches no file, or a file is not readable.
    """
    files = [file for item in path.split(",") if item.strip() for file in _find(item.strip(), field)]
    if not files:
        raise UserError(f"{field}={format_value(path)}: names no file; give parallel JSONL or Parquet")
    return list(dict.fromkeys(files))


def _find(path: str, field: str) -> list[str]:
    location = path if is_uri(path) else str(Path(expand_home(path)).absolute())
    try:
        filesystem, inner = resolve_filesystem(location)
        if filesystem.isfile(inner):
            files = [inner]
        elif filesystem.isdir(inner):
            files = sorted(
                file for file in filesystem.ls(inner, detail=False) if file.endswith(DATA_SUFFIXES)
            )
        else:
            files = sorted(filesystem.glob(inner)) if any(mark in inner for mark in "*?[") else []
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{field}={path}: cannot be reached ({first_line(error)}); check address and credentials"
        ) from error
    if not files:
        patterns = ", ".join(f"*{suffix}" for suffix in DATA_SUFFIXES)
        raise UserError(
            f"{field}={path}: no such file; give a file, a folder that holds {patterns}, or a glob"
        )
    if is_uri(location):
        return [filesystem.unstrip_protocol(file) for file in files]
    if unreadable := [file for file in files if not os.access(file, os.R_OK)]:
        raise UserError(f"{field}={unreadable[0]}: not readable; give it read permission")
    return files


def open_file(file: str) -> BinaryIO:
    """Open a file for reading. Raises UserError if it was removed after `find_files` found it."""
    with _explain_missing(file):
        if not is_uri(file):
            return open(file, "rb")
        filesystem, inner = resolve_filesystem(file)
        return cast(BinaryIO, filesystem.open(inner, "rb"))


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
    if file.endswith(".parquet"):
        return [FilePart(file, group, group + 1) for group in range(_row_groups(file, field))]
    if file.endswith((".gz", ".zst")):  # can only be read from the beginning
        return [FilePart(file, 0, size)] if size else []
    return [FilePart(file, start, min(start + part_bytes, size)) for start in range(0, size, part_bytes)]


def _row_groups(file: str, field: str) -> int:
    try:
        with open_file(file) as stream:
            return int(pq.ParquetFile(stream).num_row_groups)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{field}={file}: cannot be read ({first_line(error)}); check that it is a Parquet file"
        ) from error
