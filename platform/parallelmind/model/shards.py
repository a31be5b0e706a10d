"""Weights of which every process holds a part: DTensors that are sharded by rows."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def shard_parameters(model: nn.Module, mesh: DeviceMesh, whole: Collection[nn.Parameter] = ()) -> None:
    """Replace the parameters on the meta device by their shards, except those in `whole`. Ties stay."""
    shards: dict[nn.Parameter, nn.Parameter] = {weight: weight for weight in whole}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight not in shards:
                shards[weight] = to_mesh(weight, mesh)
            setattr(module, name, shards[weight])


def to_mesh(weight: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """The parameter sharded over a mesh on its device, without communication. It may be sharded already."""
    value: Tensor = weight.detach()
    local = value.to_local() if isinstance(value, DTensor) else own_rows(value, mesh).clone()
    if not local.is_meta:
        local = local.to(mesh.device_type)
    return nn.Parameter(from_shard(local, mesh, weight), weight.requires_grad)


def own_rows(value: Tensor, mesh: DeviceMesh) -> Tensor:
    """This process's part of a whole tensor, as FSDP divides it: the last parts may be smaller or empty."""
    parts, rank = value.chunk(mesh.size()), mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else value[:0]


def first_row(weight: DTensor) -> int:
    """The row of the whole tensor with which this process's part begins."""
    mesh = weight.device_mesh
    return min(mesh.get_local_rank() * -(-weight.shape[0] // mesh.size()), weight.shape[0])


def values_at(weight: nn.Parameter, places: list[int]) -> Tensor:
    """Float32 values at places of the flat tensor; if it is sharded, a collective operation."""
    if not isinstance(weight, DTensor):
        return weight.detach().reshape(-1)[places].float()
    local = weight.to_local().detach().reshape(-1)
    index = torch.tensor(places) - first_row(weight) * math.prod(weight.shape[1:])
    is_own = (index >= 0) & (index < local.numel())
    values = torch.zeros(len(places))
    values[is_own] = local[index[is_own]].float()
    dist.all_reduce(values, group=weight.device_mesh.get_group())
    return values


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
