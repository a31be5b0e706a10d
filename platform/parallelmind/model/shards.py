"""Weights of which every process holds a part: DTensors that are sharded by rows."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def shard_parameters(model: nn.Module, mesh: DeviceMesh, whole: Collection[nn.Parameter] = ()) -> None:
    """Replace the parameters on the meta device by their shards, except those in `whole`. Ties stay."""
    shards: dict[nn.Parameter, nn.Parameter] = {weight: weight for weight in whole}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight not in shards:
                shards[weight] = _shard(weight, mesh)
            setattr(module, name, shards[weight])


def _shard(weight: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    local = own_rows(weight.detach(), mesh).clone()
    return nn.Parameter(from_shard(local, mesh, weight), weight.requires_grad)


def own_rows(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """This process's part of a whole tensor, as FSDP divides it: the last parts may be smaller or empty."""
    parts, rank = value.chunk(mesh.size()), mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else value[:0]


def from_shard(local: Tensor, mesh: DeviceMesh, like: Tensor) -> DTensor:
    """The tensor with the shape of `like` of which `local` is this process's part."""
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def to_full(value: Tensor) -> Tensor:
    """The tensor itself, or, if it is sharded, all of it: a collective operation."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def copy_full(target: Tensor, value: Tensor) -> None:
    """Copy a tensor into one that may be sharded, without communication."""
    if isinstance(target, DTensor):
        target.to_local().copy_(own_rows(value, target.device_mesh))
    else:
        target.copy_(value)
