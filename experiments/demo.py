"""Can SmolLM2 learn to answer eight questions about a passage in parallel, in minutes on two cores?"""

from parallelmind.config import TrainConfig


def config() -> TrainConfig:
    return TrainConfig(
        name="demo",
        data_path="runs/demo-data/train.jsonl",
        validation_path="runs/demo-data/held_out.jsonl",
        visibility="isolated",
        rope_2d_ratio=0.5,
        lora_rank=16,
        learning_rate=1e-3,
        batch_size=2,
        validation_branches=[8],
        validation_samples=16,
        validate_every=12,
        checkpoint_every=50,
    )
