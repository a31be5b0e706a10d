"""How does the penalty of siblings' scores change what branches learn from each other?

python -m experiments._siblings 009_sibling_penalty
"""

from experiments._sibling_tasks import data_path
from parallelmind.config import TrainConfig
from workloads.sweep.config import SweepConfig

_TASKS = ("relay", "choose")
_PENALTIES = (1.0, 3.0)


def config() -> SweepConfig:
    return SweepConfig(
        name="sibling-penalty",
        train=TrainConfig(
            data_path=data_path("relay", "columnar"),
            dtype="bfloat16",
            packing=True,
            batch_tokens=512,
            learning_rate=1e-3,
            max_steps=120,
            checkpoint_every=60,
            log_every=20,
        ),
        points=[
            {"data_path": data_path(task, "columnar"), "sibling_penalty": penalty}
            for task in _TASKS
            for penalty in _PENALTIES
        ],
        seeds=[0, 1, 2],
        metrics=["loss"],
        register_as=None,
    )
