"""On how many tasks branches that see each other do what isolated ones cannot, from `006_siblings`.

Its adapters take an hour and a half to train: `python -m experiments._siblings` makes the table.
"""

from __future__ import annotations

from functools import partial

from benchmarks.harness import Bench
from benchmarks.result_table import ResultTable
from experiments._sibling_tasks import conflict_floor

_COMMAND = "python -m experiments._siblings"
_TABLE = ResultTable("006_siblings.csv", _COMMAND)
_RIGHT = 0.9
_CONFLICTS = 1 / 3  # of the conflicts of isolated branches
_TOKENS = 0.6  # of the tokens of isolated branches, at equal accuracy


def is_won(task: str) -> bool:
    """Whether branches that see each other reach the target of a task."""
    columnar, isolated = (partial(_TABLE.mean, task=task, form=form) for form in ("columnar", "isolated"))
    if task == "choose":
        return columnar("conflicts") <= _CONFLICTS * min(isolated("conflicts"), conflict_floor())
    if task == "find":
        is_as_right = columnar("right") >= min(isolated("right"), _RIGHT)
        return is_as_right and columnar("tokens") <= _TOKENS * isolated("tokens")
    return columnar("right") >= _RIGHT > isolated("right")


def tasks_won() -> float:
    """Tasks won, of those that the table has."""
    return sum(map(is_won, _TABLE.values("task")))


BENCHES = [Bench("branches.columnar_tasks_won", 3, "higher", "tasks", tasks_won, f"results of {_COMMAND}")]
