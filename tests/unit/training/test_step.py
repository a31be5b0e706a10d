"""The optimizer step: the mean gradient over targets, clipped, or no step at all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from parallelmind.training.step import optimizer_step


def step(gradient_sum: list[float], targets: float, clip: float) -> tuple[float, list[float]]:
    """The returned norm, and how far one SGD step with learning rate 1 moves weights that were zero."""
    module: Any = nn.Linear(len(gradient_sum), 1, bias=False)
    nn.init.zeros_(module.weight)
    module.weight.grad = torch.tensor([gradient_sum])
    norm = optimizer_step(module, torch.optim.SGD(module.parameters(), lr=1.0, fused=True), targets, clip)
    assert module.weight.grad is None
    return norm.item(), (-module.weight[0]).tolist()


def test_the_gradient_is_the_mean_over_targets() -> None:
    norm, moved = step([30.0, 40.0], targets=100, clip=1.0)
    assert norm == pytest.approx(0.5)
    assert moved == pytest.approx([0.3, 0.4])


def test_a_gradient_over_the_limit_is_scaled_to_it() -> None:
    norm, moved = step([30.0, 40.0], targets=10, clip=1.0)
    assert norm == pytest.approx(5.0)  # before clipping
    assert moved == pytest.approx([0.6, 0.8])


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    norm, moved = step([math.inf, 1.0], targets=10, clip=1.0)
    assert not math.isfinite(norm)
    assert moved == [0, 0]
