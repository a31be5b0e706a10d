"""What the laws are made of: logits of a whole sample, of a lone text and of every decoding step, and how far
apart they are.

The laws are exact in exact arithmetic; what is allowed for is the rounding of float32. A check that looks for
a difference needs weights wide enough for one token to matter, as `evaluation.tiny` makes them.
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
CLOSE = 5e-4  # what float32 rounding may do, as a share of the largest logit
LEAK = 1e-2  # what a visible token does at least

Branches = list[list[int]]


class LawViolationError(Exception):
    """A check failed; the message says by how much."""


@contextmanager
def patched(model: PreTrainedModel, config: RopeConfig) -> Iterator[RopeConfig]:
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
    move: int = 0,
    by: int = 0,
) -> list[Tensor]:
    """`layout_logits` of MAIN and these branches.

    shift: added to every branch coordinate. move, by: a branch whose coordinate is changed, and by how much.
    """
    layout = arrange(Tokens.of(MAIN, branches), config)
    moved = layout.branch + shift + (layout.sequence == move) * by
    return layout_logits(model, replace(layout, branch=moved), config)


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]


def check_close(found: Tensor, expected: Tensor, what: str, share: float = CLOSE) -> None:
    if found.numel() and not (distance := relative_distance(found, expected)) <= share:
        raise LawViolationError(f"{what} differ by {distance:.2g} of the largest logit")


def check_differ(found: Tensor, expected: Tensor, what: str) -> None:
    if not (distance := relative_distance(found, expected)) > LEAK:
        raise LawViolationError(f"{what}: logits move by {distance:.2g} of the largest only")
