"""What does the LoRA rank change under the default scheme?"""

from experiments._gsm8k import run
from workloads.sweep.config import SweepConfig


def config() -> SweepConfig:
    return SweepConfig(
        name="rank",
        train=run(
            max_steps=48,
            positions="time",
            pairs="high",
            branch_angle="added",
            rope_2d_ratio=0.5,
            sibling_penalty=3.0,
        ),
        space={"lora_rank": [2, 4, 8, 16, 32]},
        register_as=None,
    )
