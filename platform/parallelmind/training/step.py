"""One optimizer step.

Gradients are those of loss *sums*, divided once by the number of targets of all workers and all batches of
the step. So every target token has the same weight, independently of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallelmind.config import OptimizerConfig, RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.errors import UserError
from parallelmind.layout import Batch, Tokens
from parallelmind.model.inputs import to_tensors
from parallelmind.model.penalty import RATE, penalty_weights
from parallelmind.training.collectives import largest_over_workers, sum_over_workers
from parallelmind.training.loss import TargetLoss

_RATE_FACTOR = "rate_factor"  # of a group of parameters: multiplies the learning rate
_SKIPS = "found_inf"  # attribute by which torch's gradient scaler tells a fused optimizer to skip its step
_BUCKET_VALUES = 1 << 23  # of the gradients that one message sums over the workers: 32 MiB
_CPU_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")  # in the text of torch's RuntimeError


@dataclass(slots=True)
class Totals:
    """Sums of one worker, or of all workers, over the batches of a step.

    loss: over target tokens; 0 as long as it is on the device. tokens, padded_tokens: without and with
    padding. stop: workers that ask to stop.
    """

    loss: float = 0.0
    targets: float = 0.0
    tokens: float = 0.0
    padded_tokens: float = 0.0
    branches: float = 0.0
    batches: float = 0.0
    stop: float = 0.0

    def all_reduce(self) -> Totals:
        """The sums over all workers."""
        values = torch.tensor([getattr(self, item.name) for item in fields(self)], dtype=torch.float64)
        return Totals(*sum_over_workers(values).tolist())

    def add(self, batch: Batch) -> None:
        """Add everything but the loss."""
        self.targets += batch.targets
        self.tokens += batch.tokens
        self.padded_tokens += batch.ids.size
        self.branches += batch.branches
        self.batches += 1


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW; its fused kernel can skip a step by a number that is on the device."""
    penalties = penalty_weights(model)
    own_rate = set(penalties)
    others = [weight for weight in trainable(model) if weight not in own_rate]
    groups: list[dict[str, Any]] = [{"params": others}]
    if penalties:
        groups.append({"params": penalties, "weight_decay": 0.0, _RATE_FACTOR: RATE})
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step; that of learned penalties is a multiple of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(_RATE_FACTOR, 1.0)


def learning_rate(config: OptimizerConfig, position: float, planned: int) -> float:
    """Learning rate at a position in `planned` steps. Pure, so a resumed run needs no scheduler state."""
    warmup = math.ceil(config.warmup_ratio * planned)
    if position < warmup:
        return config.learning_rate * min((position + 1) / warmup, 1.0)
    progress = min((position - warmup) / max(planned - warmup, 1), 1.0)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.learning_rate * shape[config.schedule]


def accumulate_gradients(
    loss: TargetLoss,
    stream: Iterator[Batch],
    count: int,
    scale: float = 1.0,
    before_batch: Callable[[int], None] = lambda index: None,
) -> tuple[Totals, Tensor]:
    """Accumulate the gradients of up to `count` batches, times `scale`; fewer at the end of the stream.

    before_batch: called with the index of every batch. Returns this worker's totals without the loss, and the
    sum of the loss, a float64 scalar that stays on the device: nothing here waits for the device.
    """
    batches = list(islice(stream, count))
    return _run_batches(loss, batches, lambda value: (value * scale).backward(), before_batch)


@torch.no_grad()
def evaluate(loss: TargetLoss, batches: Iterable[Batch]) -> Totals:
    """Sums over batches in eval mode, without gradients."""
    training = loss.training
    loss.eval()
    totals, loss_sum = _run_batches(loss, list(batches))
    loss.train(training)
    if isinstance(loss, FSDPModule):
        loss.reshard()  # otherwise the backward pass does this
    totals.loss = loss_sum.item()
    return totals


def _run_batches(
    loss: TargetLoss,
    batches: list[Batch],
    use_loss: Callable[[Tensor], None] = lambda value: None,
    before_batch: Callable[[int], None] = lambda index: None,
) -> tuple[Totals, Tensor]:
    """Compute the loss of every batch, pass it to `use_loss`, and return the totals and the loss sum."""
    totals, loss_sum = Totals(), torch.zeros((), dtype=torch.float64, device=loss.device)
    for index, batch in enumerate(_pad_batches(loss, batches)):
        before_batch(index)
        with _explain_out_of_memory(batch):
            value, _ = loss(to_tensors(batch, loss.device))
            use_loss(value)
        loss_sum += value.detach()
        if batch is not _EMPTY_BATCH:
            totals.add(batch)
    return totals, loss_sum


_EMPTY_BATCH = make_batch([Tokens.of([], [[0, 0]], [2])], RopeConfig(), pad_id=0)  # no target


def _pad_batches(loss: TargetLoss, batches: list[Batch]) -> list[Batch]:
    """The batches; for a sharded model, with empty ones up to the largest number that a worker has.

    A forward pass of a sharded model is a collective operation.
    """
    if not isinstance(loss, FSDPModule):
        return batches
    return batches + [_EMPTY_BATCH] * (largest_over_workers(len(batches)) - len(batches))


class NoMemoryError(UserError):
    """Out of memory on a batch, which `batch` describes."""

    def __init__(self, batch: str) -> None:
        super().__init__(
            f"batch_size: {batch}; lower batch_tokens or batch_size, max_branches_per_sample or "
            "max_sample_tokens, set gradient_checkpointing=true, or quantize"
        )
        self.batch = batch

    def __reduce__(self) -> tuple[type[NoMemoryError], tuple[str]]:  # workers send it to the driver
        return NoMemoryError, (self.batch,)


@contextmanager
def _explain_out_of_memory(batch: Batch) -> Iterator[None]:
    """Turn torch's out-of-memory errors into NoMemoryError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(
            text in str(error) for text in _CPU_OUT_OF_MEMORY
        ):
            raise
        rows, tokens = batch.ids.shape
        raise NoMemoryError(
            f"out of memory on a batch of {rows} x {tokens} tokens with {batch.branches} branches"
        ) from error


def optimizer_step(
    loss: nn.Module, optimizer: torch.optim.Optimizer, targets: float | Tensor, clip: float
) -> Tensor:
    """Divide the gradients by `targets`, clip them to norm `clip` and take one step.

    optimizer: a fused one. targets: of all workers, times the loss scale. Returns the gradient norm before
    clipping, a scalar that stays on the device; if it is not finite, the weights and the optimizer state stay
    as they were.
    """
    gradients = [_local_gradient(parameter) for parameter in trainable(loss)]
    is_sharded = isinstance(loss, FSDPModule)
    if not is_sharded:  # FSDP sums over the workers in the backward pass
        _sum_gradients(gradients)
    torch._foreach_div_(gradients, targets)
    norm = _norm(gradients, is_sharded)
    torch._foreach_mul_(gradients, (clip / (norm + 1e-6)).clamp(max=1.0))
    setattr(optimizer, _SKIPS, (~norm.isfinite()).float())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _sum_gradients(gradients: list[Tensor]) -> None:
    """Sum the gradients over all workers in place, a bucket at a time."""
    if not _is_distributed():
        return
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        parts = sum_over_workers(flat).split([gradient.numel() for gradient in bucket])
        for gradient, part in zip(bucket, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """The gradients in order, in groups of at most `_BUCKET_VALUES` values or of one gradient."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(part.numel() for part in bucket) + gradient.numel() > _BUCKET_VALUES:
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _norm(gradients: list[Tensor], is_sharded: bool) -> Tensor:
    """Norm of all gradients; of the shards of all workers if they are sharded."""
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    return sum_over_workers(norm**2).sqrt() if is_sharded else norm


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    """This worker's shard of a gradient, writable; zeros if no backward pass has reached the parameter."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
