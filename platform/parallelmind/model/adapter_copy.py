"""Adapters on a copy of a model: read and tried there while the model computes, then moved onto it."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import cast

from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from parallelmind.model.branch_embedding import BranchEmbedding
from parallelmind.model.penalty import adapted_layers
from parallelmind.model.structure import causal_lm


def shared_copy(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The model without adapters, in modules of its own that share all weights and buffers.

    No other thread may compute with `model` meanwhile. Takes 30 ms for thirty layers. Hooks are shared,
    except those that are bound to the model.

    Relies on: every wrapper of peft has the module that it wraps as `base_layer` or `original_module`, and
    peft leaves nothing else on a model but the attribute `peft_config`.
    """
    base = causal_lm(model)
    shared = chain(base.parameters(), base.buffers(), _unbound_hooks(base))
    copies: dict[int, object] = {id(value): value for value in shared}
    for module in base.modules():
        wrapped = _wrapped(module)
        if wrapped is not None and id(module) not in copies:
            copies[id(module)] = deepcopy(wrapped, copies)
    copied = deepcopy(base, copies)
    vars(copied).pop("peft_config", None)
    return copied


def _unbound_hooks(model: nn.Module) -> Iterator[object]:
    for module in model.modules():
        for hook in chain(module._forward_pre_hooks.values(), module._forward_hooks.values()):
            if not isinstance(hook, partial):
                yield hook


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The module without adapters that a wrapper of peft stands for; None for any other module."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    if isinstance(module, AuxiliaryTrainingWrapper):
        original = cast(nn.Module, module.original_module)
        return _wrapped(original) or original
    return None


def is_movable(adapted: PeftModel) -> bool:
    """Whether `move_adapter` can move the adapter of this model: it is plain LoRA on linear layers."""
    return all(_is_plain(module) or _is_branch_embedding(module) for module in adapted_layers(adapted))


def _is_branch_embedding(module: nn.Module) -> bool:
    return isinstance(getattr(module, "original_module", None), BranchEmbedding)


def _is_plain(module: nn.Module) -> bool:
    return type(module) is LoraLinear and not module.lora_variant


def move_adapter(adapted: PeftModel, model: PreTrainedModel | PeftModel, name: str) -> PeftModel | None:
    """Move the adapter `name` from a copy of `model` onto it, in milliseconds; returns the adapted model.

    Linear layers stay the same objects. The copy must not be used afterwards. Returns None, with nothing
    changed, if a layer of `model` has an adapter of another kind. The caller activates an adapter.

    Relies on: all that a LoRA layer and a `ModulesToSaveWrapper` keep for an adapter are items, by the
    adapter's name, of sets and mappings that are their attributes or children; and a PeftModel finds the
    model under `base_model.model`.
    """
    base = causal_lm(model)
    wrappers = {
        path: module
        for path, module in causal_lm(adapted).named_modules()
        if isinstance(module, LoraLinear | AuxiliaryTrainingWrapper)
    }
    present = {path: base.get_submodule(path) for path in wrappers}
    if any(isinstance(old, BaseTunerLayer) and not _is_plain(old) for old in present.values()):
        return None
    for path, wrapper in wrappers.items():
        old = present[path]
        if isinstance(old, LoraLinear | AuxiliaryTrainingWrapper):
            _move_items(wrapper, old, name)
        else:
            setattr(wrapper, "base_layer" if isinstance(wrapper, LoraLinear) else "original_module", old)
            base.set_submodule(path, wrapper)
    if isinstance(model, PeftModel):
        model.peft_config[name] = adapted.peft_config[name]
        return model
    adapted.base_model.model = base
    base.peft_config = adapted.peft_config  # type: ignore[assignment, unused-ignore]
    return adapted


def _move_items(source: nn.Module, target: nn.Module, name: str) -> None:
    for attribute, values in chain(vars(source).items(), source.named_children()):
        if isinstance(values, dict | nn.ModuleDict | nn.ParameterDict) and name in values:
            getattr(target, attribute)[name] = values[name]
        elif isinstance(values, set) and name in values:
            getattr(target, attribute).add(name)
