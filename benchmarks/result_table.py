"""Means over the seeds of an experiment, from its table in experiments/results."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from statistics import fmean

from benchmarks.harness import RESULTS, UnavailableError


@dataclass(frozen=True, slots=True)
class ResultTable:
    """A table in experiments/results, and the command that makes it."""

    name: str
    command: str

    def mean(self, field: str, **where: object) -> float:
        """The mean of a column over the rows that have these values.

        Raises:
            UnavailableError: the table does not exist, or has no such row.
        """
        wanted = {name: str(value) for name, value in where.items()}
        values = [row[field] for row in self._rows() if wanted.items() <= row.items() and row[field]]
        if not values:
            given = " ".join(f"{name}={value}" for name, value in where.items())
            raise UnavailableError(f"{self.name}: no {field} with {given}; run {self.command}")
        return fmean(float(value) for value in values)

    def values(self, field: str) -> list[str]:
        """The different values of a column, in their order. Raises UnavailableError if there is no table."""
        return list(dict.fromkeys(row[field] for row in self._rows()))

    def _rows(self) -> list[dict[str, str]]:
        path = RESULTS.with_name(self.name)
        if not path.is_file():
            raise UnavailableError(f"no {self.name}; run {self.command}")
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
