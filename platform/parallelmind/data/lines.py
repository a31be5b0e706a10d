"""The lines of a part of a file, each with its place: split at newline bytes and nowhere else, whatever a
line holds.

One bad line costs no neighbour. A line too long to be held is passed over piece by piece; a compressed file
or a row group that is damaged gives every line before the damage.
"""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from parallelmind.data.files import Part, open_file
from parallelmind.errors import first_line

LONGEST = 64 << 20  # bytes of a line that is still read


@dataclass(frozen=True, slots=True)
class Line:
    """offset: of its first byte in the (uncompressed) file; the row's number in Parquet. One of raw, value
    and problem is set.

    raw: the line without its newline. value: a row of Parquet. problem: why it could not be read.
    """

    offset: int
    raw: bytes | None = None
    value: dict[str, Any] | None = None
    problem: str | None = None


def read_lines(part: Part) -> Iterator[Line]:
    """The lines that begin in this part, in order; blank ones too."""
    with open_file(part.file) as stream:
        if part.file.endswith(".parquet"):
            yield from _rows(stream, part)
        elif part.file.endswith((".gz", ".zst")):
            yield from _compressed(stream, part.file)
        else:
            yield from _plain(stream, part)


def _plain(stream: BinaryIO, part: Part) -> Iterator[Line]:
    offset = part.start
    if part.start:
        stream.seek(part.start - 1)
        # The end of a line that an earlier part reads, or one newline; of a very long line no more than this
        # part holds.
        offset += _pass_over(stream, part.end - part.start + 1) - 1
    while offset < part.end:
        line, length = _line(stream, offset)
        yield line
        offset += length


def _compressed(stream: BinaryIO, file: str) -> Iterator[Line]:
    opened: Any = (
        gzip.GzipFile(fileobj=stream) if file.endswith(".gz") else pa.CompressedInputStream(stream, "zstd")
    )
    lines, offset = cast(BinaryIO, io.BufferedReader(opened)), 0
    try:
        while True:
            line, length = _line(lines, offset)
            if not length:
                return
            yield line
            offset += length
    except (EOFError, OSError, zlib.error) as error:
        yield Line(offset, problem=f"the compressed data is damaged from here on ({first_line(error)})")


def _line(stream: BinaryIO, offset: int) -> tuple[Line, int]:
    """The next line and its length in bytes, newline included; length 0 at the end."""
    raw = stream.readline(LONGEST + 1)
    if len(raw) <= LONGEST:
        return Line(offset, raw.removesuffix(b"\n")), len(raw)
    length = len(raw) + (0 if raw.endswith(b"\n") else _pass_over(stream, sys.maxsize))
    return Line(
        offset, problem=f"has {length:,} bytes, more than the {LONGEST:,} that a line may have"
    ), length


def _pass_over(stream: BinaryIO, limit: int) -> int:
    """Read to the end of the line, or at most `limit` bytes, without holding them; returns the bytes read."""
    total = 0
    while total < limit and (piece := stream.readline(min(1 << 20, limit - total))):
        total += len(piece)
        if piece.endswith(b"\n"):
            break
    return total


def _rows(stream: BinaryIO, part: Part) -> Iterator[Line]:
    file = pq.ParquetFile(stream)
    number = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
    try:
        for batch in file.iter_batches(1024, row_groups=range(part.start, part.end)):
            for row in batch.to_pylist():
                yield Line(number, value=_without_nulls(row))
                number += 1
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: of text that is not UTF-8
        yield Line(number, problem=f"the row group is damaged from here on ({first_line(error)})")


def _without_nulls(value: Any) -> Any:
    """Columns that a row does not have are null in Parquet, and absent in JSON."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
