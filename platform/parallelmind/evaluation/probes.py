"""Logits that the laws compare, and the tolerances of the comparison.

The laws are exact in exact arithmetic; the tolerances allow for float32 rounding. A check that expects a
difference needs weights large enough for one token to matter, as those of `evaluation.tiny_models` are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.engine.decoding_check import (
    CHECK_BRANCHES,
    CHECK_MAIN,
    layout_logits,
    relative_distance,
)
from parallelmind.layout import Tokens, arrange
from parallelmind.model.patch import patch, unpatch

MAIN, BRANCHES = CHECK_MAIN, CHECK_BRANCHES
# Both as a share of the largest logit.
ROUNDING_TOLERANCE = 5e-4  # largest difference that float32 rounding causes
VISIBLE_CHANGE = 1e-2  # smallest difference that a visible token causes

Branches = list[list[int]]


class LawViolationError(Exception):
    """A model does not obey a law. The message states by how much."""


@contextmanager
def patched(model: PreTrainedModel, config: RopeConfig) -> Iterator[RopeConfig]:
    """Patch the model with `config`, and unpatch it at the end."""
    patch(model, config)
    try:
        yield config
    finally:
        unpatch(model)


def sample_logits(
    model: PreTrainedModel | PeftModel,
    config: RopeConfig,
    branches: Branches = BRANCHES,
    shift: int = 0,
    moved_branch: int = 0,
    move_by: int = 0,
) -> list[Tensor]:
    """Logits of one forward pass over MAIN and `branches`, as one `[length, vocab]` tensor for each of them.

    shift: added to all branch coordinates. move_by: added to the branch coordinate of segment
    `moved_branch` (1 is the first branch).
    """
    layout = arrange(Tokens.of(MAIN, branches), config)
    coordinates = layout.branch + shift + (layout.segment == moved_branch) * move_by
    return layout_logits(model, replace(layout, branch=coordinates), config)


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """`[length, vocab]` logits of one text, without pos2d."""
    return model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]


def check_close(actual: Tensor, expected: Tensor, label: str, tolerance: float = ROUNDING_TOLERANCE) -> None:
    """Raise LawViolationError unless the logits are equal up to `tolerance`. `label` names the logits."""
    if actual.numel() and not (distance := relative_distance(actual, expected)) <= tolerance:
        raise LawViolationError(f"{label} differ by {distance:.2g} of the largest logit")


def check_differ(actual: Tensor, expected: Tensor, label: str) -> None:
    """Raise LawViolationError unless the logits differ visibly. `label` names the logits."""
    if not (distance := relative_distance(actual, expected)) > VISIBLE_CHANGE:
        raise LawViolationError(f"{label}: logits differ by only {distance:.2g} of the largest logit")
