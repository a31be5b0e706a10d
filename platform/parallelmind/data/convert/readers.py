"""Read files and hub data sets as source records, line by line where the format has lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from parallelmind.data.convert.csv_rows import CsvRow, csv_rows
from parallelmind.data.convert.source_file import SourceFile, without_mark
from parallelmind.data.convert.source_records import BadRecord, SourceRecord
from parallelmind.data.files import COMPRESSIONS, FileFormat
from parallelmind.data.lines import DAMAGE, without_nulls
from parallelmind.data.record_parser import unique_keys
from parallelmind.errors import UserError, first_line

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LINE_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".arrow")
SOURCE_SUFFIXES = (".json", ".txt", *_DELIMITERS, *_LINE_SUFFIXES)

Records = Iterator[SourceRecord | BadRecord]


def source_suffix(file: str) -> str:
    """Which of SOURCE_SUFFIXES a file has, whatever its compression. Raises UserError for any other."""
    file_format = FileFormat.of(file)
    if not file_format.is_one_of(SOURCE_SUFFIXES):
        raise UserError(
            f"data_path={file}: unknown ending; give {', '.join(SOURCE_SUFFIXES)}, "
            f"text also with {' or '.join(COMPRESSIONS)}"
        )
    return file_format.suffix


def read_records(path: str, encoding: str | None = None) -> Records:
    """The records of a file that is not plain text. JSON with one object per line is read as JSONL.

    encoding: of text without a byte order mark; None is UTF-8.
    """
    file, suffix = SourceFile(path, encoding), source_suffix(path)
    if suffix in _DELIMITERS:
        return _read_csv(file, _DELIMITERS[suffix])
    if suffix in _LINE_SUFFIXES or (suffix == ".json" and _has_object_lines(file)):
        return _read_json_lines(file)
    return _read_json_document(file)


def read_text(path: str, encoding: str | None = None) -> Iterator[str | BadRecord]:
    """The text of a file in pieces, with newlines as line ends. A line that cannot be decoded is bad."""
    file, first = SourceFile(path, encoding), True
    for number, line in file.numbered_lines():
        try:
            yield ("" if first else "\n") + file.decode(line)
        except ValueError as error:
            yield BadRecord(f"{path}:{number}", str(error))
        first = False


def _read_json_lines(file: SourceFile) -> Records:
    for number, line in file.numbered_lines():
        location = f"{file.path}:{number}"
        if line.value is not None:
            yield SourceRecord(location, line.value)
            continue
        try:
            text = file.decode(line)
            if text.strip():
                yield SourceRecord(location, json.loads(text, object_pairs_hook=unique_keys))
        except json.JSONDecodeError as error:
            yield BadRecord(location, f"is not JSON: {error}")
        except RecursionError:
            yield BadRecord(location, "is nested too deeply")
        except ValueError as error:
            yield BadRecord(location, str(error))


def _read_csv(file: SourceFile, delimiter: str) -> Records:
    """The rows of a CSV file, with the names of its header as keys. Raises UserError for a bad header."""
    unreadable: list[BadRecord] = []
    rows = csv_rows(_csv_lines(file, unreadable), delimiter)
    header = _csv_header(file, next(rows, None))
    for row in rows:
        location, problem = f"{file.path}:{row.line}", _row_problem(file, row, header)
        cells = row.cells or []
        yield (
            BadRecord(location, problem)
            if problem
            else SourceRecord(location, dict(zip(header, cells, strict=True)))
        )
    yield from unreadable


def _csv_header(file: SourceFile, row: CsvRow | None) -> list[str]:
    names = row.cells or [] if row else []
    problem = _row_problem(file, row, names) if row else None
    if repeated := [name for name in names if names.count(name) > 1]:
        problem = f"has the column {repeated[0]!r} twice"
    if problem:
        raise UserError(f"data_path={file.path}: its header {problem}; correct the first line")
    return names


def _csv_lines(file: SourceFile, unreadable: list[BadRecord]) -> Iterator[tuple[int, str]]:
    """Lines for the CSV reader. Undecodable bytes become lone surrogates, which `_row_problem` finds.

    Lines that cannot be read are appended to `unreadable`.
    """
    for number, line in file.numbered_lines():
        if line.raw is None or b"\0" in line.raw:
            unreadable.append(BadRecord(f"{file.path}:{number}", line.problem or file.undecodable))
        else:
            yield number, without_mark(line).decode("utf-8", errors="surrogateescape") + "\n"


def _row_problem(file: SourceFile, row: CsvRow, header: list[str]) -> str | None:
    """Why a row of CSV is bad, or None."""
    if row.cells is None:
        return row.problem
    try:
        "".join(row.cells).encode()
    except UnicodeEncodeError:
        return file.undecodable
    if len(row.cells) != len(header):
        return f"has {'more' if len(row.cells) > len(header) else 'fewer'} columns than the header"
    return None


def _has_object_lines(file: SourceFile) -> bool:
    """Whether the first line is a complete object and another line follows."""
    first_two = [line.raw for (_, line), _ in zip(file.numbered_lines(), range(2), strict=False)]
    try:
        return len(first_two) == 2 and isinstance(json.loads(first_two[0] or b""), dict)
    except (ValueError, RecursionError):
        return False


def _read_json_document(file: SourceFile) -> Records:
    """The elements of a JSON file's list, or of its list under `data`; otherwise the file as one record."""
    value, name = _load_json(file), ""
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value, name = value["data"], "data"
    if not isinstance(value, list):
        yield SourceRecord(file.path, value)
        return
    for index, element in enumerate(value):
        yield SourceRecord(f"{file.path}:{name}[{index}]", element)


def _load_json(file: SourceFile) -> Any:
    try:
        return json.loads(file.read(), object_pairs_hook=unique_keys)
    except (*DAMAGE, ValueError, RecursionError) as error:
        raise UserError(
            f"data_path={file.path}: is not JSON ({first_line(error)}); correct it, or rename it to .jsonl"
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
            yield SourceRecord(f"{name}/{split}[{number}]", without_nulls(row))
    except Exception as error:  # the hub, the network and the format of the data set raise many types
        raise UserError(
            f"dataset={name} subset={subset} split={split}: cannot be loaded ({first_line(error)}); "
            "check the three names and the network"
        ) from error
