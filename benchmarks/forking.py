"""What a model that forks by itself gains and loses, from the table of `experiments/008_forking`.

Its adapters take hours to train: `python -m experiments._forking PATH/xquad.en.json` makes the table.
"""

from __future__ import annotations

from benchmarks.harness import Bench
from benchmarks.result_table import ResultTable

_COMMAND = "python -m experiments._forking PATH/xquad.en.json"
_TABLE = ResultTable("008_forking.csv", _COMMAND)


def mean(field: str, form: str) -> float:
    return _TABLE.mean(field, form=form)


def f1_difference() -> float:
    """Points of F1, forking minus sequential."""
    return 100 * (mean("f1", "forking") - mean("f1", "sequential"))


def critical_path() -> float:
    """Steps of a request, forking over sequential."""
    return mean("steps", "forking") / mean("steps", "sequential")


def wall_clock() -> float:
    """Seconds of a request, sequential over forking."""
    return mean("seconds", "sequential") / mean("seconds", "forking")


def hangs() -> float:
    """Answers of 1,000 at temperature 1 that exceed a limit."""
    return mean("hangs", "forking")


BENCHES = [
    Bench("branches.fork_f1_vs_sequential", -1.0, "higher", "points", f1_difference, _COMMAND),
    Bench("branches.fork_critical_path", 0.3, "lower", "ratio", critical_path, _COMMAND),
    Bench("branches.fork_wall_vs_sequential", 2.0, "higher", "ratio", wall_clock, _COMMAND),
    Bench("branches.fork_hangs", 0.0, "lower", "answers", hangs, _COMMAND),
]
