"""2D RoPE as pure functions: the coordinate of each rotary pair, and the selection of angles.

Source: the ParallelMind scheme, in which a share of the lowest frequencies alternates between branch and
time. Here the share may be at other frequencies, and pairs may follow other combinations of coordinates. This
module repeats no RoPE formula: angles come from the model's own module.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallelmind.config import BranchAngle, Pairs

FLAT, BRANCH, TIME = 0, 1, 2


def selected_pairs(pairs: int, ratio: float, where: Pairs) -> NDArray[np.int64]:
    """Ascending indices of the `clamp(round(pairs * ratio), 1, pairs)` pairs that pos2d drives.

    Empty for ratio 0. pairs: number of rotary frequency pairs of a head, highest frequency first.
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

    With `alone` the selected pairs alternate, branch first, since a pair follows one coordinate. With `added`
    all selected pairs are BRANCH.
    """
    axes = np.full(pairs, FLAT)
    selected = selected_pairs(pairs, ratio, where)
    axes[selected] = BRANCH
    if angle == "alone":
        axes[selected[1::2]] = TIME
    return axes


def mix(flat: Tensor, branch: Tensor, time: Tensor, axes: Tensor) -> Tensor:
    """`[..., columns]`: each column from the table of its coordinate.

    flat, branch, time: `[..., columns]`, the table at each coordinate. axes: `[columns]`.
    """
    return torch.where(axes == BRANCH, branch, torch.where(axes == TIME, time, flat))
