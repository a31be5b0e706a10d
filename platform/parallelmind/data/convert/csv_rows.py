"""Rows of CSV and TSV. A row that cannot be parsed costs the line that its fault begins in, and no other."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from parallelmind.data.lines import MAX_LINE_BYTES


@dataclass(frozen=True, slots=True)
class CsvRow:
    """One row that is not blank. Exactly one of cells and problem is set.

    line: number of the line that it begins in; with a problem, of the line that the faulty cell begins in.
    """

    line: int
    cells: list[str] | None = None
    problem: str | None = None


def csv_rows(lines: Iterator[tuple[int, str]], delimiter: str) -> Iterator[CsvRow]:
    """The rows of numbered lines, each of which ends in a newline.

    After a row that cannot be parsed, reading continues in the line after that of the faulty cell. So a quote
    that never closes does not take the rest of the file with it.
    """
    csv.field_size_limit(MAX_LINE_BYTES)  # the default of 128 KiB is too small for documents
    unread: deque[tuple[int, str]] = deque()
    taken: list[tuple[int, str]] = []

    def take_lines() -> Iterator[str]:
        while line := unread.popleft() if unread else next(lines, None):
            taken.append(line)
            yield line[1]

    def new_reader() -> Iterator[list[str]]:
        return csv.reader(take_lines(), delimiter=delimiter, strict=True)

    reader = new_reader()
    while True:
        taken.clear()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            faulty = _line_of_fault("".join(text for _, text in taken), delimiter)
            yield CsvRow(taken[faulty][0], problem=_problem(error, spans_lines=faulty < len(taken) - 1))
            unread.extendleft(reversed(taken[faulty + 1 :]))
            reader = new_reader()
            continue
        if cells is None:
            return
        if cells:
            yield CsvRow(taken[0][0], cells)


def _line_of_fault(text: str, delimiter: str) -> int:
    """Index of the line in which the first cell begins that does not end before a delimiter."""
    quoted, plain = r'"[^"]*(?:""[^"]*)*"', rf'[^"{delimiter}\n][^{delimiter}\n]*'
    complete_cells = re.compile(f"(?:(?:{quoted}|{plain})?{delimiter})*")
    match = complete_cells.match(text)
    return text.count("\n", 0, match.end()) if match else 0


def _problem(error: csv.Error, spans_lines: bool) -> str:
    if spans_lines or "end of data" in str(error):
        return "a quote that opens in this line does not close before a delimiter"
    return f"is not CSV: {error}; a quote inside quotes is written twice"
