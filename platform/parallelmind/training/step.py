"""One optimizer step: gradients of loss *sums*, divided once by the targets of all workers and all micro-batches.

So a target token weighs the same wherever it lies, whatever the lengths of the batches around it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallelmind.config import OptimizerConfig, Visibility
from parallelmind.layout import Batch
from parallelmind.training.loss import target_loss, to_tensors


@dataclass(slots=True)
class Totals:
    """What the workers add up at a step. batches, stop: of how many workers' batches, how many want to stop."""

    loss: float = 0.0
    targets: float = 0.0
    tokens: float = 0.0
    places: float = 0.0
    branches: float = 0.0
    batches: float = 0.0
    stop: float = 0.0

    def everywhere(self, device: torch.device) -> Totals:
        values = torch.tensor([getattr(self, item.name) for item in fields(self)], dtype=torch.float64, device=device)
        return Totals(*sum_over_workers(values).tolist())


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=config.learning_rate, weight_decay=config.weight_decay)


def learning_rate(config: OptimizerConfig, step: int, planned: int) -> float:
    """The rate of step 0, 1, … of about `planned`: a pure function, so a resumed run needs no scheduler state."""
    warmup = math.ceil(config.warmup_ratio * planned)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min((step - warmup) / max(planned - warmup, 1), 1.0)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.learning_rate * shape[config.schedule]


def backward(model: nn.Module, stream: Iterator[Batch], count: int, visibility: Visibility) -> Totals:
    """Add the gradients of up to `count` batches; fewer, or none, where the stream ends."""
    totals = Totals()
    for batch, loss in _losses(model, islice(stream, count), visibility, totals):
        if batch.targets:
            loss.backward()
    return totals


@torch.no_grad()
def measure(model: nn.Module, batches: Iterable[Batch], visibility: Visibility) -> Totals:
    """The same sums without gradients, in eval mode."""
    training = model.training
    model.eval()
    totals = Totals()
    for _ in _losses(model, batches, visibility, totals):
        pass
    model.train(training)
    return totals


def _losses(model: nn.Module, batches: Iterable[Batch], visibility: Visibility, totals: Totals) -> Iterator[tuple[Batch, Tensor]]:
    device = next(model.parameters()).device
    for batch in batches:
        loss, targets = target_loss(model, to_tensors(batch, device), visibility)
        totals.loss += loss.item()
        totals.targets += targets
        totals.tokens += batch.tokens
        totals.places += batch.ids.size
        totals.branches += int(batch.sequence.max(axis=1).sum())
        totals.batches += 1
        yield batch, loss


def update(model: nn.Module, optimizer: torch.optim.Optimizer, targets: float, clip: float) -> float:
    """Mean gradient over all workers' targets, clipped, one step. Returns the gradient norm before clipping.

    A norm that is not finite leaves the weights and the optimizer's state as they were.
    """
    parameters = trainable(model)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
    flat = sum_over_workers(flat) / targets
    norm = float(flat.norm())
    if math.isfinite(norm):
        flat *= min(clip / (norm + 1e-6), 1.0)
        for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def sum_over_workers(values: Tensor) -> Tensor:
    """Summed in place over all workers; itself where there is but one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values
