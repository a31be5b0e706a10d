"""Grids of RopeConfig values that the laws are checked with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from parallelmind.config import RopeConfig


def rope_config_grid(**values: Sequence[Any]) -> list[RopeConfig]:
    """RopeConfigs for every combination of the given field values."""
    return [
        RopeConfig.model_validate(dict(zip(values, combination, strict=True)))
        for combination in product(*values.values())
    ]


_LAYOUTS = rope_config_grid(
    visibility=("columnar", "isolated"), positions=("time", "flat"), align_to=("left", "right")
)
_ROTATIONS = [
    *rope_config_grid(
        rope_2d_ratio=(0.0, 0.5, 1.0), pairs=("low",), branch_angle=("alone",), sibling_penalty=(0.0,)
    ),
    *rope_config_grid(rope_2d_ratio=(0.5,), pairs=("high",), branch_angle=("added",), sibling_penalty=(1.5,)),
]
_ROTATION_FIELDS = {"rope_2d_ratio", "pairs", "branch_angle", "sibling_penalty"}

ALL_ROPE_CONFIGS = [
    layout.model_copy(update=rotation.model_dump(include=_ROTATION_FIELDS))
    for layout, rotation in product(_LAYOUTS, _ROTATIONS)
]
# 8 of the 32 combinations: every layout once and every rotation twice.
SAMPLED_ROPE_CONFIGS = [ALL_ROPE_CONFIGS[4 * index + (index + index // 4) % 4] for index in range(8)]
