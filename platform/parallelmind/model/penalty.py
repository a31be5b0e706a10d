"""The learned sibling penalty: one number for each query head of every attention module.

A patched model gets a small module beside the projections of each attention module. peft copies it for
every adapter (`modules_to_save`), so it is trained, saved, switched and deleted with the adapter. Without an
adapter every head has the starting value.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.errors import UserError
from parallelmind.model.hf_compat import (
    EAGER,
    SDPA,
    attention_name,
    compares_attention_name,
    passes_masks,
    replace_layer_mask,
)
from parallelmind.model.structure import text_modules
from parallelmind.visibility import learns_penalty

NAME = "sibling_penalty"  # of the module in the attention module, and in the names of its weights

# Between 0, the penalty of a task whose branches read each other, and 3, which keeps branches apart that do
# not: a head reaches both within a short run, and a sibling's share of the attention is still large enough
# for a gradient.
START = 1.0

# By which its learning rate exceeds that of other weights: a penalty moves by nats, a weight of LoRA by
# hundredths. With the default learning rate, 0.02 nats in a step.
RATE = 100.0


class SiblingPenalty(nn.Module):
    """weight: float32 `[heads]` penalties in nats. They may become negative, which attracts attention."""

    def __init__(self, heads: int, device: torch.device) -> None:
        super().__init__()
        start = torch.full((heads,), START, device=device)
        self.weight = nn.Parameter(start, requires_grad=False)


def check_takes_penalties(model: PreTrainedModel, config: RopeConfig) -> None:
    """Raise UserError if penalties are learned and the layers of the model cannot have masks of their own."""
    if not learns_penalty(config):
        return
    name = attention_name(model)
    if name not in (SDPA, EAGER):
        problem = f"attn_implementation={name} gives all layers one mask; choose sdpa or eager"
    elif not _passes_masks_on(model, name):
        problem = f"the layers of {model.config.model_type} compute with the mask themselves; set a number"
    else:
        return
    raise UserError(f"sibling_penalty=learned: {problem}")


def _passes_masks_on(model: PreTrainedModel, attention: str) -> bool:
    has_own = passes_masks(model) and any(True for _ in _attention_modules(model))
    return has_own and not (attention == SDPA and compares_attention_name(model))


def add_penalties(model: PreTrainedModel) -> list[RemovableHandle]:
    """Give every attention module a penalty; returns the hooks that give it its mask where that needs any."""
    hooks = []
    for attention in _attention_modules(model):
        heads = attention.config.get_text_config(decoder=True).num_attention_heads
        device = next(attention.parameters()).device
        attention.add_module(NAME, SiblingPenalty(heads, device))
        if attention_name(model) == EAGER:
            hooks.append(attention.register_forward_pre_hook(replace_layer_mask, with_kwargs=True))
    return hooks


def remove_penalties(model: nn.Module) -> None:
    """Undo `add_penalties`."""
    for module in list(model.modules()):
        if NAME in module._modules:
            del module._modules[NAME]


def layer_penalty(attention: nn.Module) -> Tensor:
    """`[heads]` penalty of an attention module: of its active adapter, or the starting value without one."""
    module: Any = attention.get_submodule(NAME)
    return cast(Tensor, module.weight)


def penalty_weights(model: nn.Module) -> list[nn.Parameter]:
    """The penalties that are trained."""
    modules = (module for module in model.modules() if isinstance(module, SiblingPenalty))
    return [module.weight for module in modules if module.weight.requires_grad]


def adapted_layers(model: nn.Module) -> list[Any]:
    """The wrappers of peft in a model, except those of penalties."""
    return [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        and not isinstance(getattr(module, "original_module", None), SiblingPenalty)
    ]


def penalties_by_layer(model: PreTrainedModel) -> dict[int, AdapterPenalties]:
    """The penalties of all adapters, by the number of the layer; empty for a model without penalties."""
    return {
        attention.layer_idx: AdapterPenalties(attention.get_submodule(NAME))
        for attention in _attention_modules(model)
        if NAME in attention._modules
    }


class AdapterPenalties:
    """The penalties of one layer."""

    def __init__(self, module: nn.Module) -> None:
        self._module: Any = module

    def of(self, adapter: str) -> Tensor:
        """`[heads]` penalty of an adapter, or the starting value for one without penalties."""
        own = getattr(self._module, "modules_to_save", {})
        module = own[adapter] if adapter in own else getattr(self._module, "original_module", self._module)
        weight: Tensor = module.weight.detach()
        return weight


def _attention_modules(model: PreTrainedModel) -> Iterator[Any]:
    """The modules that know their layer and take a mask, but not the layers that hold them."""
    takes_mask = [
        module
        for module in text_modules(model).values()
        if isinstance(getattr(module, "layer_idx", None), int)
        and "attention_mask" in inspect.signature(type(module).forward).parameters
    ]
    for module in takes_mask:
        if not any(other is not module and other in takes_mask for other in module.modules()):
            yield module
