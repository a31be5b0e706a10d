"""2D RoPE as pure functions: which rotary pair follows which coordinate, and how angles are picked.

Source: the ParallelMind scheme (a share of the lowest frequencies alternates between branch and time),
generalised in where the share lies and in what turns it. No formula of a rotary embedding is repeated here:
angles come from the model's own module.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallelmind.config import BranchAngle, Pairs

FLAT, BRANCH, TIME = 0, 1, 2


def selected_pairs(pairs: int, ratio: float, where: Pairs) -> NDArray[np.int64]:
    """Rising indices of the `clamp(round(pairs * ratio), 1, pairs)` pairs driven by pos2d; none for ratio 0.

    pairs: rotary frequency pairs of a head, highest frequency first.
    """
    if ratio == 0 or pairs == 0:
        return np.empty(0, dtype=np.int64)
    count = min(max(round(pairs * ratio), 1), pairs)
    if where == "low":
        return np.arange(pairs - count, pairs)
    if where == "high":
        return np.arange(count)
    if where == "mid":
        return np.arange(count) + (pairs - count) // 2
    return (np.arange(1, count + 1) * pairs) // count - 1


def pair_axes(pairs: int, ratio: float, where: Pairs, angle: BranchAngle) -> NDArray[np.int64]:
    """`[pairs]`: FLAT, BRANCH or TIME for every pair.

    alone: the selected ones alternate, branch first, since a pair can follow but one of the two. added: all
    are BRANCH.
    """
    axes = np.full(pairs, FLAT)
    chosen = selected_pairs(pairs, ratio, where)
    axes[chosen] = BRANCH
    if angle == "alone":
        axes[chosen[1::2]] = TIME
    return axes


def mix(flat: Tensor, branch: Tensor, time: Tensor, axes: Tensor) -> Tensor:
    """Columns of one table out of three.

    flat, branch, time: `[..., columns]`, the table at each coordinate. axes: `[columns]`. Returns `[...,
    columns]`.
    """
    return torch.where(axes == BRANCH, branch, torch.where(axes == TIME, time, flat))
