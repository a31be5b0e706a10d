"""Do questions asked together get the same answers as questions asked alone, and how much faster?

Trains one adapter per visibility; `python -m experiments._questions` evaluates them.
"""

from parallelmind.config import TrainConfig
from workloads.sweep.config import SweepConfig


def config() -> SweepConfig:
    return SweepConfig(
        name="questions",
        train=TrainConfig(
            data_path="runs/data/xquad.train.jsonl",
            validation_path="runs/data/xquad.en.jsonl",
            max_branch_tokens=640,
            max_branches_per_sample=8,
            batch_size=4,
            batch_by_samples=True,
            learning_rate=5e-4,
            validation_branches=[1, 2, 4, 8],
            validation_samples=64,
            validate_every=1000,
            checkpoint_every=20,
            log_every=10,
        ),
        space={"visibility": ["columnar", "isolated"]},
        register_as=None,
    )
