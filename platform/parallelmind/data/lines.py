"""Read the lines of a file part, each with its offset. Lines end at newline bytes only.

A bad line does not affect its neighbours: a line that is too long is skipped without being held in memory,
and a damaged compressed file or row group yields every line before the damage.
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

from parallelmind.data.files import FileFormat, FilePart, open_arrow, open_file
from parallelmind.data.text_encoding import as_utf8, marked_encoding
from parallelmind.errors import first_line

MAX_LINE_BYTES = 64 << 20
_SKIP_BYTES = 1 << 20  # read at a time while a line is skipped
_ROWS_PER_BATCH = 1024
_NO_PYTHON_VALUE = (OverflowError, ValueError, pa.ArrowException)  # far dates, text that is not UTF-8
DAMAGE = (EOFError, OSError, zlib.error)  # what reading damaged compressed data raises


@dataclass(frozen=True, slots=True)
class Line:
    """One line of JSONL or one row of Parquet or Arrow. Exactly one of raw, value and problem is set.

    offset: of the first byte in the (uncompressed) file; the row number in Parquet and Arrow. raw: the line
    without its newline. value: the row. problem: why the line could not be read.
    """

    offset: int
    raw: bytes | None = None
    value: dict[str, Any] | None = None
    problem: str | None = None


def read_lines(part: FilePart, encoding: str | None = None) -> Iterator[Line]:
    """The lines that begin in this part, in order, blank ones included.

    encoding: of text that is not UTF-8; the part is then the whole file, and the lines and their offsets are
    those of the file as UTF-8.
    """
    file_format = FileFormat.of(part.file)
    with open_file(part.file) as stream:
        if file_format.is_parquet:
            yield from _parquet_rows(stream, part)
        elif file_format.is_arrow:
            yield from _arrow_rows(stream)
        elif file_format.is_divisible and encoding is None:
            yield from _plain_lines(stream, part)
        else:
            text = decompress(stream, file_format.compression)
            yield from _stream_lines(as_utf8(text, encoding) if encoding else text)


def decompress(stream: BinaryIO, compression: str) -> BinaryIO:
    """The content of a stream with a compression of `FileFormat`. Reading it may raise `DAMAGE`."""
    if not compression:
        return stream
    decompressed: Any = (
        gzip.GzipFile(fileobj=stream) if compression == ".gz" else pa.CompressedInputStream(stream, "zstd")
    )
    return cast(BinaryIO, io.BufferedReader(decompressed))


def _plain_lines(stream: BinaryIO, part: FilePart) -> Iterator[Line]:
    offset = part.start
    if part.start:
        # Skip the rest of a line that began in an earlier part, or its newline; never read beyond this part.
        stream.seek(part.start - 1)
        offset += _skip_line(stream, part.end - part.start + 1) - 1
    while offset < part.end:
        line, length = _read_line(stream, offset)
        yield line
        offset += length


def _stream_lines(stream: BinaryIO) -> Iterator[Line]:
    offset = 0
    try:
        while True:
            line, length = _read_line(stream, offset)
            if not length:
                return
            yield line
            offset += length
    except DAMAGE as error:
        yield Line(offset, problem=f"the compressed data is damaged from here on ({first_line(error)})")


def _read_line(stream: BinaryIO, offset: int) -> tuple[Line, int]:
    """The next line and its length in bytes, newline included; length 0 at the end of the file."""
    raw = stream.readline(MAX_LINE_BYTES + 1)
    if offset == 0 and (encoding := marked_encoding(raw)) not in (None, "utf-8"):
        problem = f"the file is {encoding}; convert it as `iconv -f {encoding} -t utf-8` does"
        return Line(offset, problem=problem), len(raw)
    if len(raw) <= MAX_LINE_BYTES:
        return Line(offset, raw.removesuffix(b"\n")), len(raw)
    length = len(raw) + (0 if raw.endswith(b"\n") else _skip_line(stream, sys.maxsize))
    problem = f"has {length:,} bytes; the limit for a line is {MAX_LINE_BYTES:,}"
    return Line(offset, problem=problem), length


def _skip_line(stream: BinaryIO, limit: int) -> int:
    """Read to the end of the line, at most `limit` bytes, without keeping them. Returns the bytes read."""
    total = 0
    while total < limit and (piece := stream.readline(min(_SKIP_BYTES, limit - total))):
        total += len(piece)
        if piece.endswith(b"\n"):
            break
    return total


def _parquet_rows(stream: BinaryIO, part: FilePart) -> Iterator[Line]:
    file = pq.ParquetFile(stream)
    number = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
    try:
        for batch in file.iter_batches(_ROWS_PER_BATCH, row_groups=range(part.start, part.end)):
            yield from _rows(batch, number)
            number += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        yield Line(number, problem=f"the row group is damaged from here on ({first_line(error)})")


def _arrow_rows(stream: BinaryIO) -> Iterator[Line]:
    number = 0
    try:
        for batch in open_arrow(stream):
            for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
                yield from _rows(batch.slice(start, _ROWS_PER_BATCH), number + start)
            number += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        yield Line(number, problem=f"the file is damaged from here on ({first_line(error)})")


def _rows(batch: pa.RecordBatch, number: int) -> Iterator[Line]:
    """The rows of a batch; number: that of its first row. A row without a Python value is bad alone."""
    try:
        values = batch.to_pylist()
    except _NO_PYTHON_VALUE as error:
        if batch.num_rows == 1:
            yield Line(number, problem=f"the row cannot be read ({first_line(error)})")
            return
        for index in range(batch.num_rows):
            yield from _rows(batch.slice(index, 1), number + index)
        return
    for index, value in enumerate(values):
        yield Line(number + index, value=without_nulls(value))


def without_nulls(value: Any) -> Any:
    """Remove null fields: a column that a row lacks is null in Arrow and absent in JSON."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
