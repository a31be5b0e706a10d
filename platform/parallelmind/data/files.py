"""Which files a data path means, wherever they lie, and cutting them into parts that can be read in
parallel.
"""

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
from parallelmind.remote import resolve_filesystem

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_PART_BYTES = 1 << 20, 1 << 26  # least and most, of plain JSONL
_PARTS = (
    1 << 14
    # planning a part takes milliseconds in one process, so a large corpus is cut into so many at most, if it can
)


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of one file: bytes start..end of plain JSONL, row groups of Parquet, the whole of a
    compressed file.
    """

    file: str
    start: int
    end: int


def find_files(path: str, name: str = "data_path") -> list[str]:
    """Every file that a path means, in a fixed order: a file, a folder, a glob, a URL of any of them, or
    several of these with commas between. Raises UserError where one of them means none.
    """
    found = [file for item in path.split(",") if item.strip() for file in _find(item.strip(), name)]
    if not found:
        raise UserError(f"{name}={format_value(path)}: names no file; give parallel JSONL or Parquet")
    return list(dict.fromkeys(found))


def _find(path: str, name: str) -> list[str]:
    place = path if "://" in path else str(Path(path).expanduser().absolute())
    try:
        system, inner = resolve_filesystem(place)
        if system.isfile(inner):
            files = [inner]
        elif system.isdir(inner):
            files = sorted(file for file in system.ls(inner, detail=False) if file.endswith(ENDINGS))
        else:
            files = sorted(system.glob(inner)) if any(mark in inner for mark in "*?[") else []
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"{name}={path}: cannot be reached ({first_line(error)}); check address and credentials"
        ) from error
    if not files:
        kinds = ", ".join(f"*{ending}" for ending in ENDINGS)
        raise UserError(f"{name}={path}: no such file; give a file, a folder that holds {kinds}, or a glob")
    if "://" not in place and (closed := [file for file in files if not os.access(file, os.R_OK)]):
        raise UserError(f"{name}={closed[0]}: not readable; give it read permission")
    return [file if "://" not in place else system.unstrip_protocol(file) for file in files]


def open_file(file: str) -> BinaryIO:
    """Raises UserError where the file has gone since it was found."""
    with _there(file):
        if "://" not in file:
            return open(file, "rb")
        system, inner = resolve_filesystem(file)
        return cast(BinaryIO, system.open(inner, "rb"))


@contextmanager
def _there(file: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        reason = error.strerror or first_line(error)
        raise UserError(
            f"data_path={file}: was there, and cannot be read any more ({reason}); restore it"
        ) from error


def file_parts(files: Sequence[str], name: str = "data_path") -> list[Part]:
    """Parts that cover the files, in order; the same for the same files. Raises UserError for one that is no
    Parquet inside.
    """
    sizes = {file: _size(file) for file in files}
    least, most = _PART_BYTES
    length = min(most, max(least, sum(sizes.values()) // _PARTS))
    return [part for file in files for part in _parts(file, sizes[file], length, name)]


def total_bytes(files: Sequence[str]) -> int:
    """Of the files as they lie there, compressed or not."""
    return sum(map(_size, files))


def _size(file: str) -> int:
    with _there(file):
        system, inner = resolve_filesystem(file)
        return int(system.size(inner))


def _parts(file: str, size: int, length: int, name: str) -> list[Part]:
    if file.endswith(".parquet"):
        try:
            with open_file(file) as stream:
                return [
                    Part(file, group, group + 1) for group in range(pq.ParquetFile(stream).num_row_groups)
                ]
        except (OSError, pa.ArrowException) as error:
            remedy = "see that it is what its ending says"
            raise UserError(f"{name}={file}: cannot be read ({first_line(error)}); {remedy}") from error
    if file.endswith((".gz", ".zst")):  # can be read from the beginning only
        return [Part(file, 0, size)] if size else []
    return [Part(file, at, min(at + length, size)) for at in range(0, size, length)]
