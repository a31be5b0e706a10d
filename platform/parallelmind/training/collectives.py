"""Sums and maxima over all workers, and collective operations that autograd follows."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_workers(values: Tensor) -> Tensor:
    """Sum in place over all workers. Values of the host do not wait for the device."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values, group=_host_group(dist.group.WORLD) if values.is_cpu else None)
    return values


def largest_over_workers(value: int) -> int:
    """The largest of a number of every worker. The device does not wait."""
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_host_group(dist.group.WORLD))
    return int(largest)


@cache
def _host_group(world: Any) -> Any:
    """The group of all workers that takes tensors of the host; NCCL's takes none."""
    return world if "cpu:" in dist.get_backend_config(world) else dist.new_group(backend="gloo")


def all_gather(values: Tensor) -> Tensor:
    """`[rows, ...]` of every worker to `[workers * rows, ...]`. Its gradient is `reduce_scatter`."""
    gathered: Tensor = _AllGather.apply(values)
    return gathered


def reduce_scatter(values: Tensor) -> Tensor:
    """`[workers * rows, ...]` to this worker's `[rows, ...]` of the sum. Its gradient is `all_gather`."""
    own: Tensor = _ReduceScatter.apply(values)
    return own


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        gathered = values.new_empty(dist.get_world_size() * values.shape[0], *values.shape[1:])
        dist.all_gather(list(gathered.chunk(dist.get_world_size())), values.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return reduce_scatter(gradients[0])


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        own = values.new_empty(values.shape[0] // dist.get_world_size(), *values.shape[1:])
        dist.reduce_scatter(own, list(values.contiguous().chunk(dist.get_world_size())))
        return own

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_gather(gradients[0])
