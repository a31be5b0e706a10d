"""The training that experiments on sibling tasks share, so that their adapters can be compared."""

from __future__ import annotations

from typing import Any

from experiments._sibling_tasks import data_path
from parallelmind.config import TrainConfig
from workloads.sweep.config import SweepConfig


def sibling_sweep(name: str, points: list[dict[str, Any]]) -> SweepConfig:
    """A sweep with three seeds of every point, on 512 tokens a step; 120 steps unless a point differs."""
    return SweepConfig(
        name=name,
        train=TrainConfig(
            data_path=data_path("relay", "columnar"),
            dtype="bfloat16",
            sibling_penalty=0.0,
            packing=True,
            batch_tokens=512,
            learning_rate=1e-3,
            max_steps=120,
            checkpoint_every=60,
            log_every=20,
        ),
        points=points,
        seeds=[0, 1, 2],
        metrics=["loss"],
        register_as=None,
    )
