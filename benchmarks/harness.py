"""Run benchmarks (functions that return one number) and record the results next to their targets."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Literal

from rich.console import Console
from rich.table import Table

from benchmarks.processor import machine

RESULTS = Path(__file__).resolve().parent.parent / "experiments" / "results" / "bench.json"


@dataclass(frozen=True, slots=True)
class Bench:
    """A named measurement and its target.

    target: None for a figure that is only reported.
    conditions: under which it is measured on this machine; recorded with the command.
    """

    name: str
    target: float | None
    better: Literal["higher", "lower"]
    unit: str
    measure: Callable[[], float]
    conditions: str = ""


class UnavailableError(Exception):
    """Raised by a measurement that this machine cannot make; the message says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One result: an entry of `bench.json`."""

    name: str
    value: float
    target: float | None
    better: str
    unit: str
    machine: str
    date: str
    command: str

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock time of one call, in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(numerator: Callable[[], object], denominator: Callable[[], object], repeats: int) -> float:
    """Return the median of time(numerator) / time(denominator) over `repeats` alternating pairs.

    Alternating exposes both to the same load of the machine. Each is warmed up once. With `repeats=1` the
    numerator is not warmed up, because such a numerator takes minutes.
    """
    if repeats > 1:
        numerator()
    denominator()
    return median(seconds(numerator) / seconds(denominator) for _ in range(repeats))


def run(benches: list[Bench], prefix: str, command: str) -> list[Row]:
    """Run and record every benchmark whose name starts with `prefix`; results of other names stay."""
    rows = []
    for bench in benches:
        if not bench.name.startswith(prefix):
            continue
        print(f"{bench.name} …", end=" ", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            value = float(f"{bench.measure():.4g}")
        except UnavailableError as reason:
            print(f"skipped: {reason}", file=sys.stderr, flush=True)
            continue
        print(f"{value:g} {bench.unit} ({time.perf_counter() - start:.0f} s)", file=sys.stderr, flush=True)
        rows.append(_row(bench, value, command))
        record(rows)
    return rows


def _row(bench: Bench, value: float, command: str) -> Row:
    command = f"{command} ({bench.conditions})" if bench.conditions else command
    today = str(date.today())
    return Row(bench.name, value, bench.target, bench.better, bench.unit, machine(), today, command)


def record(rows: list[Row]) -> None:
    """Merge rows into `bench.json` by name."""
    recorded = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []
    merged = {row["name"]: row for row in recorded} | {row.name: asdict(row) for row in rows}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(
        json.dumps([merged[name] for name in sorted(merged)], indent=1) + "\n", encoding="utf-8"
    )


def show(rows: list[Row]) -> None:
    """Print rows as a table."""
    table = Table("name", "value", "target", "unit", "met")
    for row in rows:
        sign = "≥" if row.better == "higher" else "≤"
        target = "" if row.target is None else f"{sign} {row.target:g}"
        table.add_row(
            row.name, f"{row.value:g}", target, row.unit, {None: "", True: "yes", False: "NO"}[row.met]
        )
    Console(width=None if sys.stdout.isatty() else 110).print(table)
