"""Can branches that see each other solve what isolated ones cannot?

Each task is trained with branches that see each other, with isolated ones, and as one text, on equally many
tokens. One command makes the data, runs this sweep and measures its adapters:

    python -m experiments._siblings
"""

from experiments._sibling_tasks import FORMS, TASKS, data_path
from parallelmind.config import TrainConfig
from workloads.sweep.config import SweepConfig


def config() -> SweepConfig:
    return SweepConfig(
        name="siblings",
        train=TrainConfig(
            data_path=data_path("relay", "columnar"),
            dtype="bfloat16",
            sibling_penalty=0.0,
            packing=True,
            batch_tokens=512,
            learning_rate=1e-3,
            max_steps=120,
            checkpoint_every=60,
            log_every=20,
        ),
        points=[
            {
                "data_path": data_path(task, form),
                "visibility": "columnar" if form == "columnar" else "isolated",
            }
            for task in TASKS
            for form in FORMS
        ],
        seeds=[0, 1, 2],
        metrics=["loss"],
        register_as=None,
    )
