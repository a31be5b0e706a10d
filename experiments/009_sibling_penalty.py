"""How do the penalty of siblings' scores and the rotation by branch change what branches learn of each other?

Branches are asked for a fact of a sibling's, with three penalties, with a learned one, and without a penalty
in three other schemes: one clock for all branches, which no rotation by branch tells apart, the same with
embeddings of branches (as in Multi-Stream LLMs), and a rotation by branch that replaces time in its pairs
(as published).

    python -m experiments._siblings 009_sibling_penalty
"""

from experiments._sibling_training import sibling_sweep
from workloads.sweep.config import SweepConfig


def config() -> SweepConfig:
    return sibling_sweep(
        "sibling-penalty",
        [
            {"sibling_penalty": 0.0},
            {"sibling_penalty": 1.0},
            {"sibling_penalty": 3.0},
            {"sibling_penalty": "learned"},
            {"rope_2d_ratio": 0.0},
            {"rope_2d_ratio": 0.0, "branch_embeddings": 8},
            {"branch_angle": "alone"},
        ],
    )
