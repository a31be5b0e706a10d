"""Files and data sets as source records, a line at a time where the format has lines."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from parallelmind.data.convert.items import Bad, Item
from parallelmind.data.files import file_parts, open_file
from parallelmind.data.lines import MAX_LINE_BYTES, Line, read_lines
from parallelmind.errors import UserError, first_line

_BOM = b"\xef\xbb\xbf"
_LINES = (".jsonl", ".parquet")
ENDINGS = (".json", ".jsonl", ".txt", ".csv", ".parquet")


def ending(file: str) -> str:
    """Which of ENDINGS a file has, compression left aside. Raises UserError for another."""
    plain = file.removesuffix(".gz")
    for known in ENDINGS:
        if plain.endswith(known):
            return known
    raise UserError(
        f"data_path={file}: unknown ending; give {', '.join(ENDINGS)}, or any but the last with .gz"
    )


def read_items(file: str) -> Iterator[Item | Bad]:
    """The records of a JSON, JSONL, CSV or Parquet file; a JSON file that holds one object a line counts as
    JSONL.
    """
    kind = ending(file)
    if kind == ".csv":
        return _table(file)
    if kind in _LINES or (kind == ".json" and _has_lines(file)):
        return _lines(file)
    return _document(file)


def read_text(file: str) -> Iterator[str | Bad]:
    """The text of a file in pieces, with every line's end as a newline; a line that is not UTF-8 is bad."""
    first = True
    for number, line in _numbered(file):
        try:
            yield ("" if first else "\n") + _decoded(line)
        except ValueError as error:
            yield Bad(f"{file}:{number}", str(error))
        first = False


def _numbered(file: str) -> Iterator[tuple[int, Line]]:
    try:
        yield from enumerate((line for part in file_parts([file]) for line in read_lines(part)), start=1)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"data_path={file}: cannot be read ({first_line(error)}); see that it is what its ending says"
        ) from error


def _decoded(line: Line) -> str:
    """The text of a line. Raises ValueError with the reason why there is none."""
    if line.raw is None:
        raise ValueError(line.problem)
    try:
        return line.raw.removeprefix(_BOM if line.offset == 0 else b"").removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from error


def _lines(file: str) -> Iterator[Item | Bad]:
    for number, line in _numbered(file):
        place = f"{file}:{number}"
        if line.value is not None:
            yield Item(place, line.value)
            continue
        try:
            text = _decoded(line)
            if text.strip():
                yield Item(place, json.loads(text))
        except json.JSONDecodeError as error:
            yield Bad(place, f"is not JSON: {error}")
        except RecursionError:
            yield Bad(place, "is nested too deeply")
        except ValueError as error:
            yield Bad(place, str(error))


def _table(file: str) -> Iterator[Item | Bad]:
    """The rows of a CSV file under the names of its header."""
    csv.field_size_limit(MAX_LINE_BYTES)  # the default of 128 KiB is less than many a document
    problems: list[Bad] = []
    rows = csv.DictReader(_csv_lines(file, problems), strict=True)
    while True:
        try:
            row: dict[Any, Any] = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            yield Bad(f"{file}:{rows.line_num}", f"is not CSV: {error}")
            continue
        place = f"{file}:{rows.line_num}"
        yield Bad(place, reason) if (reason := _row_problem(row)) else Item(place, row)
    yield from problems


def _csv_lines(file: str, problems: list[Bad]) -> Iterator[str]:
    """Lines for the CSV reader, bytes that are not UTF-8 as lone surrogates; what cannot be read goes into
    `problems`.
    """
    for number, line in _numbered(file):
        if line.raw is None:
            problems.append(Bad(f"{file}:{number}", line.problem or ""))
        else:
            raw = line.raw.removeprefix(_BOM if line.offset == 0 else b"")
            yield raw.decode("utf-8", errors="surrogateescape") + "\n"


def _row_problem(row: dict[Any, Any]) -> str | None:
    if None in row or None in row.values():
        return f"has {'more' if None in row else 'fewer'} columns than the header"
    try:
        "".join(row.values()).encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None


def _has_lines(file: str) -> bool:
    """Whether the first line alone is an object, and there is another line."""
    found = [line.raw for (_, line), _ in zip(_numbered(file), range(2), strict=False)]
    try:
        return len(found) == 2 and isinstance(json.loads(found[0] or b""), dict)
    except (ValueError, RecursionError):
        return False


def _document(file: str) -> Iterator[Item | Bad]:
    """The elements of a JSON file's list, or of the list under `data`; else the whole as one record."""
    value, name = _loaded(file), ""
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value, name = value["data"], "data"
    if not isinstance(value, list):
        yield Item(file, value)
        return
    for index, element in enumerate(value):
        yield Item(f"{file}:{name}[{index}]", element)


def _loaded(file: str) -> Any:
    try:
        with open_file(file) as stream:
            raw = stream.read()
        return json.loads(
            (gzip.decompress(raw) if file.endswith(".gz") else raw).removeprefix(_BOM).decode("utf-8")
        )
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(
            f"data_path={file}: is not JSON ({first_line(error)}); mend it, or rename it to .jsonl"
        ) from error


def dataset_items(name: str, subset: str | None, split: str) -> Iterator[Item | Bad]:
    """The rows of a data set of the Hugging Face hub, streamed. Raises UserError where it cannot be
    loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"dataset={name}: needs the package datasets, which is not installed; pip install datasets"
        ) from error
    try:
        for number, row in enumerate(datasets.load_dataset(name, subset, split=split, streaming=True)):
            yield Item(f"{name}/{split}[{number}]", row)
    except Exception as error:  # whatever the hub, the network or the data set's own format raises
        where = f"dataset={name} subset={subset} split={split}"
        raise UserError(
            f"{where}: cannot be loaded ({first_line(error)}); check the three and the network"
        ) from error
