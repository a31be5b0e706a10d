"""One optimizer step: gradients of loss *sums*, divided once by the targets of all workers and all
micro-batches.

So a target token weighs the same wherever it lies, whatever the lengths of the batches around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallelmind.config import OptimizerConfig, RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.errors import UserError
from parallelmind.layout import Batch, Tokens
from parallelmind.training.loss import TargetLoss, to_tensors

_NO_MEMORY = ("can't allocate memory", "not enough memory")  # how torch says so on a CPU


@dataclass(slots=True)
class Totals:
    """What the workers add up at a step. batches, stop: of how many workers' batches, how many want to
    stop.
    """

    loss: float = 0.0
    targets: float = 0.0
    tokens: float = 0.0
    places: float = 0.0
    branches: float = 0.0
    batches: float = 0.0
    stop: float = 0.0

    def everywhere(self, device: torch.device) -> Totals:
        values = torch.tensor(
            [getattr(self, item.name) for item in fields(self)], dtype=torch.float64, device=device
        )
        return Totals(*sum_over_workers(values).tolist())

    def count(self, batch: Batch, loss: float) -> None:
        self.loss += loss
        self.targets += batch.targets
        self.tokens += batch.tokens
        self.places += batch.ids.size
        self.branches += int(batch.sequence.max(axis=1).sum())
        self.batches += 1


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(trainable(model), lr=config.learning_rate, weight_decay=config.weight_decay)


def learning_rate(config: OptimizerConfig, position: float, planned: int) -> float:
    """The rate at step 0, 1, … of about `planned`: a pure function, so a resumed run needs no scheduler
    state.
    """
    warmup = math.ceil(config.warmup_ratio * planned)
    if position < warmup:
        return config.learning_rate * min((position + 1) / warmup, 1.0)
    progress = min((position - warmup) / max(planned - warmup, 1), 1.0)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.learning_rate * shape[config.schedule]


def accumulate_gradients(loss: TargetLoss, stream: Iterator[Batch], count: int, scale: float = 1.0) -> Totals:
    """Add the gradients of up to `count` batches, times `scale`; fewer, or none, where the stream ends."""
    return _passes(loss, list(islice(stream, count)), lambda value: (value * scale).backward())


@torch.no_grad()
def evaluate(loss: TargetLoss, batches: Iterable[Batch]) -> Totals:
    """The same sums without gradients, in eval mode."""
    training = loss.training
    loss.eval()
    totals = _passes(loss, list(batches))
    loss.train(training)
    if isinstance(loss, FSDPModule):
        loss.reshard()  # a backward pass, which would do it, doesn't follow
    return totals


def _passes(
    loss: TargetLoss, batches: list[Batch], then: Callable[[Tensor], None] = lambda value: None
) -> Totals:
    """The sums over the batches; `then` gets each loss."""
    totals = Totals()
    for batch in _in_step(loss, batches):
        with _memory_for(batch):
            value, _ = loss(to_tensors(batch, loss.device))
            then(value)
        if batch is not _BLANK:
            totals.count(batch, value.item())
    return totals


_BLANK = make_batch([Tokens.of([], [[0, 0]], [2])], RopeConfig(), pad_id=0)  # no target


def _in_step(loss: TargetLoss, batches: list[Batch]) -> list[Batch]:
    """The batches; where the model is sharded, filled up to as many as the worker with the most has.

    A forward pass of a sharded model needs every worker.
    """
    if not isinstance(loss, FSDPModule):
        return batches
    most = torch.tensor(len(batches), device=loss.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return batches + [_BLANK] * (int(most) - len(batches))


class NoMemoryError(UserError):
    """Memory ran out on a batch; `batch` says on which one. The remedy is that of training."""

    def __init__(self, batch: str) -> None:
        remedy = "lower batch_size, max_branches_per_sample or max_sample_tokens, or set gradient_checkpointing=true"
        super().__init__(f"batch_size: {batch}; {remedy}")
        self.batch = batch

    def __reduce__(self) -> tuple[type[NoMemoryError], tuple[str]]:  # it goes from workers to the driver
        return NoMemoryError, (self.batch,)


@contextmanager
def _memory_for(batch: Batch) -> Iterator[None]:
    """Running out of memory becomes one line that says on what, and what to do."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(
            text in str(error) for text in _NO_MEMORY
        ):
            raise
        rows, tokens = batch.ids.shape
        branches = int(batch.sequence.max())
        raise NoMemoryError(
            f"out of memory on a batch of {rows} x {tokens} tokens, up to {branches} branches each"
        ) from error


def optimizer_step(loss: TargetLoss, optimizer: torch.optim.Optimizer, targets: float, clip: float) -> float:
    """Mean gradient over all workers' targets, clipped, one step. Returns the gradient norm before clipping.

    targets: times the scale that the losses had. A norm that is not finite leaves the weights and the
    optimizer's state as they were.
    """
    parts = [_own_part(parameter) for parameter in trainable(loss)]
    flat = torch.cat([part.flatten().float() for part in parts])
    if not isinstance(loss, FSDPModule):  # there the backward pass has added the workers up
        sum_over_workers(flat)
    flat /= targets
    norm = float(sum_over_workers(flat.norm() ** 2).sqrt() if isinstance(loss, FSDPModule) else flat.norm())
    if math.isfinite(norm):
        flat *= min(clip / (norm + 1e-6), 1.0)
        for part, gradient in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(gradient.view_as(part))
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _own_part(parameter: nn.Parameter) -> Tensor:
    """This worker's part of a gradient, to read and to write; zeros where no pass has touched the
    parameter.
    """
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def sum_over_workers(values: Tensor) -> Tensor:
    """Summed in place over all workers; itself where there is but one."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values
