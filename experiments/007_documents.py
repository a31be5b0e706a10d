"""Do documents as branches answer as well as the same documents as one text?

One command makes the data, runs this sweep and evaluates its adapters with 2, 4 and 8 documents:

    python -m experiments._documents path/to/xquad.en.json
"""

from parallelmind.config import TrainConfig
from workloads.sweep.config import SweepConfig


def config() -> SweepConfig:
    return SweepConfig(
        name="documents",
        train=TrainConfig(
            data_path="runs/data/documents.train.jsonl",
            dtype="bfloat16",
            visibility="isolated",
            positions="time",
            max_branch_tokens=6144,
            max_sample_tokens=6144,
            batch_size=1,
            accumulation_steps=2,
            learning_rate=1e-3,
            checkpoint_every=20,
            log_every=10,
        ),
        space={"data_path": ["runs/data/documents.train.jsonl", "runs/data/concatenated.train.jsonl"]},
        seeds=[0, 1, 2],
        metrics=["loss"],
        register_as=None,
    )
