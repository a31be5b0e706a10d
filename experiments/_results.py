"""The folder of results, tables in it, and the trials of a sweep."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]  # of an adapter


def trained(sweep: Path) -> list[Path]:
    """The folders of the trials of a sweep. Ends the program if one of them has no adapter."""
    trials = sorted((sweep / "trials").iterdir())
    missing = [trial for trial in trials if not (trial / "adapter").exists()]
    if missing:
        sys.exit(f"{len(missing)} of {len(trials)} trials have no adapter; the same command repeats them")
    return trials


def updated(path: Path, measured: Iterable[Row], key: Callable[[Row], Any]) -> list[Row]:
    """Replace or add what was measured now in a CSV table, and return all its rows, sorted by key.

    So the adapters of an experiment can be trained in several runs.
    key: what tells an adapter from the others.
    """
    by_key = {key(row): row for row in [*read_table(path), *measured]}
    rows = [by_key[each] for each in sorted(by_key)]
    write_table(path, rows)
    return rows


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV. The columns are the fields of all rows, in the order in which they first occur."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path) -> list[Row]:
    """The rows of a CSV table, numbers as numbers; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
