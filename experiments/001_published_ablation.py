"""What does the published scheme cost at each ratio, and does training on many branches help?"""

from experiments._gsm8k import PUBLISHED, run
from workloads.sweep.config import SweepConfig


def config() -> SweepConfig:
    return SweepConfig(
        name="published",
        train=run(max_steps=48, **PUBLISHED),
        space={"rope_2d_ratio": [0.0, 0.25, 0.5, 0.75, 1.0], "max_branches_per_sample": [1, 8]},
        register_as=None,
    )
