"""Can branches that see each other solve what isolated ones cannot, and what does the sibling penalty do?

Each task is trained with branches that see each other at three penalties, with isolated ones, and as one
text.
One command makes the data, runs this sweep and measures its adapters: `python -m experiments._siblings`.
"""

from typing import Any

from experiments._sibling_tasks import TASKS
from parallelmind.config import TrainConfig
from workloads.sweep.config import SweepConfig

# Forms of the data, each with the settings to train with.
_FORMS: list[tuple[str, dict[str, Any]]] = [
    *(("columnar", {"visibility": "columnar", "sibling_penalty": penalty}) for penalty in (0.0, 1.0, 3.0)),
    ("isolated", {"visibility": "isolated"}),
    ("text", {"visibility": "isolated"}),
]


def config() -> SweepConfig:
    return SweepConfig(
        name="siblings",
        train=TrainConfig(
            data_path="runs/data/siblings.relay.columnar.jsonl",
            dtype="bfloat16",
            batch_size=8,
            batch_by_samples=True,
            learning_rate=5e-4,
            max_steps=200,
            checkpoint_every=50,
            log_every=20,
        ),
        points=[
            {"data_path": f"runs/data/siblings.{task}.{form}.jsonl", **settings}
            for task in TASKS
            for form, settings in _FORMS
        ],
        seeds=[0, 1, 2],
        metrics=["loss"],
        register_as=None,
    )
