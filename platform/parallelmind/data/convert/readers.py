"""Read files and hub data sets as source records, line by line where the format has lines."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from parallelmind.data.convert.source_records import BadRecord, SourceRecord
from parallelmind.data.files import file_parts, open_file
from parallelmind.data.lines import MAX_LINE_BYTES, Line, read_lines
from parallelmind.errors import UserError, first_line

SOURCE_SUFFIXES = (".json", ".jsonl", ".txt", ".csv", ".parquet")
_LINE_SUFFIXES = (".jsonl", ".parquet")
_BOM = b"\xef\xbb\xbf"

Records = Iterator[SourceRecord | BadRecord]


def source_suffix(file: str) -> str:
    """Which of SOURCE_SUFFIXES a file has, without .gz. Raises UserError for any other."""
    uncompressed = file.removesuffix(".gz")
    for suffix in SOURCE_SUFFIXES:
        if uncompressed.endswith(suffix):
            return suffix
    suffixes = ", ".join(SOURCE_SUFFIXES)
    raise UserError(f"data_path={file}: unknown ending; give {suffixes}, all but the last also with .gz")


def read_records(file: str) -> Records:
    """The records of a JSON, JSONL, CSV or Parquet file. JSON with one object per line is read as JSONL."""
    suffix = source_suffix(file)
    if suffix == ".csv":
        return _read_csv(file)
    if suffix in _LINE_SUFFIXES or (suffix == ".json" and _has_object_lines(file)):
        return _read_json_lines(file)
    return _read_json_document(file)


def read_text(file: str) -> Iterator[str | BadRecord]:
    """The text of a file in pieces, with newlines as line ends. A line that is not UTF-8 is bad."""
    first = True
    for number, line in _numbered_lines(file):
        try:
            yield ("" if first else "\n") + _decode(line)
        except ValueError as error:
            yield BadRecord(f"{file}:{number}", str(error))
        first = False


def _numbered_lines(file: str) -> Iterator[tuple[int, Line]]:
    try:
        yield from enumerate((line for part in file_parts([file]) for line in read_lines(part)), start=1)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"data_path={file}: cannot be read ({first_line(error)}); check that its format matches its name"
        ) from error


def _decode(line: Line) -> str:
    """The text of a line. Raises ValueError with the reason if it has none."""
    if line.raw is None:
        raise ValueError(line.problem)
    try:
        return line.raw.removeprefix(_BOM if line.offset == 0 else b"").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error


def _read_json_lines(file: str) -> Records:
    for number, line in _numbered_lines(file):
        location = f"{file}:{number}"
        if line.value is not None:
            yield SourceRecord(location, line.value)
            continue
        try:
            text = _decode(line)
            if text.strip():
                yield SourceRecord(location, json.loads(text))
        except json.JSONDecodeError as error:
            yield BadRecord(location, f"is not JSON: {error}")
        except RecursionError:
            yield BadRecord(location, "is nested too deeply")
        except ValueError as error:
            yield BadRecord(location, str(error))


def _read_csv(file: str) -> Records:
    """The rows of a CSV file, with the names of its header as keys."""
    csv.field_size_limit(MAX_LINE_BYTES)  # the default of 128 KiB is too small for documents
    unreadable: list[BadRecord] = []
    rows = csv.DictReader(_csv_lines(file, unreadable), strict=True)
    while True:
        try:
            row: dict[Any, Any] = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            yield BadRecord(f"{file}:{rows.line_num}", f"is not CSV: {error}")
            continue
        location = f"{file}:{rows.line_num}"
        yield BadRecord(location, reason) if (reason := _row_problem(row)) else SourceRecord(location, row)
    yield from unreadable


def _csv_lines(file: str, unreadable: list[BadRecord]) -> Iterator[str]:
    """Lines for the CSV reader. Bytes that are not UTF-8 become lone surrogates, which `_row_problem` finds.

    Lines that cannot be read are appended to `unreadable`.
    """
    for number, line in _numbered_lines(file):
        if line.raw is None:
            unreadable.append(BadRecord(f"{file}:{number}", line.problem or ""))
        else:
            raw = line.raw.removeprefix(_BOM if line.offset == 0 else b"")
            yield raw.decode("utf-8", errors="surrogateescape") + "\n"


def _row_problem(row: dict[Any, Any]) -> str | None:
    """Why a row of CSV is bad, or None."""
    if None in row or None in row.values():
        return f"has {'more' if None in row else 'fewer'} columns than the header"
    try:
        "".join(row.values()).encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None


def _has_object_lines(file: str) -> bool:
    """Whether the first line is a complete object and another line follows."""
    first_two = [line.raw for (_, line), _ in zip(_numbered_lines(file), range(2), strict=False)]
    try:
        return len(first_two) == 2 and isinstance(json.loads(first_two[0] or b""), dict)
    except (ValueError, RecursionError):
        return False


def _read_json_document(file: str) -> Records:
    """The elements of a JSON file's list, or of its list under `data`; otherwise the file as one record."""
    value, name = _load_json(file), ""
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value, name = value["data"], "data"
    if not isinstance(value, list):
        yield SourceRecord(file, value)
        return
    for index, element in enumerate(value):
        yield SourceRecord(f"{file}:{name}[{index}]", element)


def _load_json(file: str) -> Any:
    try:
        with open_file(file) as stream:
            raw = stream.read()
        uncompressed = gzip.decompress(raw) if file.endswith(".gz") else raw
        return json.loads(uncompressed.removeprefix(_BOM).decode("utf-8"))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(
            f"data_path={file}: is not JSON ({first_line(error)}); correct it, or rename it to .jsonl"
        ) from error


def read_dataset(name: str, subset: str | None, split: str) -> Records:
    """The rows of a Hugging Face hub data set, streamed. Raises UserError if it cannot be loaded."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"dataset={name}: needs the package datasets, which is not installed; pip install datasets"
        ) from error
    try:
        for number, row in enumerate(datasets.load_dataset(name, subset, split=split, streaming=True)):
            yield SourceRecord(f"{name}/{split}[{number}]", row)
    except Exception as error:  # the hub, the network and the format of the data set raise many types
        raise UserError(
            f"dataset={name} subset={subset} split={split}: cannot be loaded ({first_line(error)}); "
            "check the three names and the network"
        ) from error
