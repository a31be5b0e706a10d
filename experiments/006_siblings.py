"""Can branches that see each other solve what isolated ones cannot?

Each task is trained with branches that see each other, with isolated ones, and as one text, on equally many
tokens. One command makes the data, runs this sweep and measures its adapters:

    python -m experiments._siblings
"""

from experiments._sibling_tasks import FORMS, TASKS, data_path
from experiments._sibling_training import sibling_sweep
from workloads.sweep.config import SweepConfig

_STEPS = {"add": 180}  # sums are not learnt in the 120 steps of the other tasks


def config() -> SweepConfig:
    points = [
        {
            "data_path": data_path(task, form),
            "visibility": "columnar" if form == "columnar" else "isolated",
            "max_steps": _STEPS.get(task, 120),
        }
        for task in TASKS
        for form in FORMS
    ]
    return sibling_sweep("siblings", points)
