"""How do the penalty of siblings' scores and the rotation by branch change what branches learn of each other?

Branches are asked for a fact of a sibling's, with three penalties, with a learned one, and without a penalty
in two other schemes: one clock for all branches (no rotation by branch, as in Multi-Stream LLMs, whose
stream embeddings are left out), and a rotation by branch that replaces time in its pairs (as published).
`006_siblings` holds the same with penalty 0.

    python -m experiments._siblings 009_sibling_penalty
"""

from experiments._sibling_tasks import data_path
from parallelmind.config import TrainConfig
from workloads.sweep.config import SweepConfig


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
            {"sibling_penalty": 0.0},
            {"sibling_penalty": 1.0},
            {"sibling_penalty": 3.0},
            {"sibling_penalty": "learned"},
            {"sibling_penalty": 0.0, "rope_2d_ratio": 0.0},
            {"sibling_penalty": 0.0, "branch_angle": "alone"},
        ],
        seeds=[0, 1, 2],
        metrics=["loss"],
        register_as=None,
    )
