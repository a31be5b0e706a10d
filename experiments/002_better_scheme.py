"""Is there a scheme without branch tax, for one branch and for sixteen?

CONTROL is the unpatched model with plain LoRA and one branch per row. All other points are columnar.
"""

from typing import Any

from experiments._gsm8k import PUBLISHED, run
from workloads.sweep.config import SweepConfig

CONTROL = {"rope_2d_ratio": 0.0, "visibility": "isolated", "max_branches_per_sample": 1}
ADDED: dict[str, Any] = {"rope_2d_ratio": 0.5, "pairs": "high", "branch_angle": "added"}


def config() -> SweepConfig:
    return SweepConfig(
        name="scheme",
        train=run(max_steps=64, positions="time", visibility="columnar", branch_stride=16),
        points=[
            CONTROL,
            {**ADDED, "sibling_penalty": 3.0},
            {**PUBLISHED, "rope_2d_ratio": 0.5},
            {**PUBLISHED, "rope_2d_ratio": 1.0},
            {**ADDED, "sibling_penalty": 0.0},
            {**ADDED, "rope_2d_ratio": 0.0, "sibling_penalty": 3.0},
        ],
        register_as="scheme",
    )
