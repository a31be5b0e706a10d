"""Is an answer of many parts as good, and faster, if the model forks by itself into one branch per part?

Trains one adapter on each form of the same answers: one after the other, and as forks. One command makes the
data, runs this sweep and measures its adapters: `python -m experiments._forking PATH/xquad.en.json`.
"""

from parallelmind.config import TrainConfig
from workloads.sweep.config import SweepConfig


def config() -> SweepConfig:
    return SweepConfig(
        name="forking",
        train=TrainConfig(
            data_path="runs/data/forking.sequential.jsonl",
            fork_markers=["{{", "||", "}}", "@@"],
            visibility="isolated",
            dtype="bfloat16",
            max_branch_tokens=2048,
            max_branches_per_sample=16,
            batch_size=2,
            learning_rate=1e-3,
            epochs=1,
            checkpoint_every=20,
            log_every=10,
        ),
        space={"data_path": ["runs/data/forking.sequential.jsonl", "runs/data/forking.forking.jsonl"]},
        seeds=[0, 1, 2],
        metrics=["loss"],
        register_as=None,
    )
