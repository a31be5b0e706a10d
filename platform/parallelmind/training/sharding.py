"""Fully sharded data parallelism (FSDP2): every worker holds a part of every weight."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from parallelmind.model.hf_compat import block_class_names
from parallelmind.model.shards import to_mesh
from parallelmind.model.structure import causal_lm
from parallelmind.training.loss import TargetLoss
from parallelmind.training.vocabulary_parallel import shard_vocabulary

_LARGE_SHARE = 0.1  # of a decoder layer's weights, from which on a child is gathered by itself


@cache
def host_mesh() -> DeviceMesh:
    """The mesh of all workers for tensors on the CPU, with a process group of its own.

    The first call is a collective operation.
    """
    return DeviceMesh.from_group(dist.new_group(backend="gloo"), "cpu")


def shard(loss: TargetLoss, device: torch.device) -> None:
    """Shard the model in place on `device`: attention, MLP and norms of each decoder layer, and the rest.

    Each of these units is gathered when it runs. Embedding and LM head never are, see `vocabulary_parallel`.
    Weights that `load_base` has sharded over `host_mesh` move there as they are; each worker takes its part
    of all others. Weights are gathered in the compute dtype. Gradients are summed over the workers in
    float32, unit by unit during the backward pass. Raises UserError as `check_lm_head` does.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    vocabulary = shard_vocabulary(causal_lm(loss.model), mesh)
    loaded = _take_shards(loss, vocabulary)
    for unit in (*_units(loss.model), loss):
        sharded = fully_shard(unit, mesh=mesh, mp_policy=_precision(loss.dtype), ignored_params=vocabulary)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo supports no other reduction
        if device.type == "cpu":  # gathering the next unit early would need its memory and three copies of it
            sharded.set_modules_to_backward_prefetch([sharded])
    loss.load_state_dict(_move_shards(loaded, mesh), strict=False, assign=True)
    register_fsdp_forward_method(loss, "check_head")
    loss.eval().check_head()  # dropout would make two passes differ
    loss.train()
    loss.reshard()  # type: ignore[operator]  # a method that fully_shard has added


def _units(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, each after its large parts; what is left of the layer are its norms."""
    names = block_class_names(causal_lm(model))
    layers = [module for module in model.modules() if type(module).__name__ in names]
    return [unit for layer in layers for unit in (*_large_parts(layer), layer)]


def _large_parts(layer: nn.Module) -> list[nn.Module]:
    """The children that hold a large share of its weights: attention and MLP, whatever their names."""
    least = _LARGE_SHARE * _size(layer)
    return [part for part in layer.children() if _has_forward(part) and _size(part) >= least]


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _has_forward(module: nn.Module) -> bool:
    """FSDP gathers a unit when its forward is called, which a ModuleList does not have."""
    return type(module).forward is not nn.Module.forward


def _precision(dtype: torch.dtype) -> MixedPrecisionPolicy:
    if dtype == torch.float32:
        return MixedPrecisionPolicy()
    # Autocast chooses the dtypes of inputs, as it does without sharding.
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _take_shards(model: nn.Module, kept: Collection[nn.Parameter]) -> dict[str, nn.Parameter]:
    """The sharded parameters by name, but those in `kept`; whole ones on the meta device take their place."""
    taken: dict[str, nn.Parameter] = {}
    stand_ins: dict[nn.Parameter, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(weight.data, DTensor) and weight not in kept:
                taken[f"{path}.{name}"] = weight
                if weight not in stand_ins:
                    whole = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                    stand_ins[weight] = nn.Parameter(whole, weight.requires_grad)
                setattr(module, name, stand_ins[weight])
    return taken


def _move_shards(shards: dict[str, nn.Parameter], mesh: DeviceMesh) -> dict[str, Tensor]:
    """The sharded parameters on the device of another mesh. Ties stay."""
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for weight in shards.values():
        if weight not in moved:
            moved[weight] = to_mesh(weight, mesh)
    return {name: moved[weight] for name, weight in shards.items()}
