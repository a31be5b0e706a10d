"""Steps whose results are still on the device. One read fetches those of many steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallelmind.training.step import Totals


@dataclass(frozen=True, slots=True)
class UnreadStep:
    """An optimizer step that was launched.

    number: of the step, from 1. totals: of all workers; their loss is set when the step is read. rate: its
    learning rate. loss_sum, norm: scalars on the device, the loss of all workers and the gradient norm.
    """

    number: int
    totals: Totals
    rate: float
    loss_sum: Tensor
    norm: Tensor


def read_all(steps: Sequence[UnreadStep]) -> Iterator[tuple[UnreadStep, float]]:
    """The steps with their losses, and their gradient norms. Waits for the device once."""
    if not steps:
        return
    scalars = [torch.stack([step.loss_sum, step.norm.double()]) for step in steps]
    for step, (loss, norm) in zip(steps, torch.stack(scalars).tolist(), strict=True):
        step.totals.loss = loss
        yield step, norm
