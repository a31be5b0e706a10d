"""Patch a Hugging Face causal LM for pos2d, in place and reversibly: `model(..., pos2d=…)`.

Rotary modules mix the coordinates (`rotary`), and hooks remove `pos2d` from the call and pass it to them
(`forward_context`). A call without `pos2d` is a single branch at coordinate 0 whose time is `position_ids`.
No model is named anywhere: whether a model can be patched is decided by its structure (`support`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from parallelmind.config import Positions, RopeConfig
from parallelmind.errors import UserError
from parallelmind.model import forward_context
from parallelmind.model.hf_compat import OwnAttention, compares_attention_name, hands_over_masks
from parallelmind.model.rotary import patch_rotary, unpatch_rotary
from parallelmind.model.structure import decoder
from parallelmind.model.support import check_supported
from parallelmind.visibility import effective_penalty


@dataclass(frozen=True, slots=True)
class _Patch:
    """State of a patched model. attention: None where the model keeps transformers' attention."""

    config: RopeConfig
    hooks: tuple[RemovableHandle, ...]
    attention: OwnAttention | None


def patch(model: PreTrainedModel, config: RopeConfig) -> None:
    """Patch `model` in place.

    Raises UserError, with nothing changed, if the model is already patched or cannot hold branches.
    """
    if is_patched(model):
        raise UserError("model: is already patched; unpatch it first")
    check_supported(model)
    if config.rope_2d_ratio > 0:
        patch_rotary(model, config)
    hooks = []
    # Both take pos2d: peft calls the model's forward without its hooks, and training calls the decoder alone.
    for module in (model, decoder(model)):
        hooks.append(
            module.register_forward_pre_hook(partial(_before_forward, config.positions), with_kwargs=True)
        )
        hooks.append(module.register_forward_hook(_after_forward, always_call=True))
    attention = None
    if hands_over_masks(model) and not compares_attention_name(model):
        attention = OwnAttention(model)
        attention.acquire()
    object.__setattr__(model, "_pos2d", _Patch(config, tuple(hooks), attention))


def unpatch(model: PreTrainedModel) -> None:
    """Undo `patch`: classes, buffers, hooks and configuration are restored. Raises UserError if unpatched."""
    state = _patch_of(model)
    for hook in state.hooks:
        hook.remove()
    if state.attention is not None:
        state.attention.release()
    unpatch_rotary(model)
    object.__delattr__(model, "_pos2d")


def is_patched(model: nn.Module) -> bool:
    """Whether the model (or the model inside a PeftModel) is patched."""
    return getattr(model, "_pos2d", None) is not None


def rope_config(model: nn.Module) -> RopeConfig:
    """The settings of a patched model, or of the one inside a PeftModel. Raises UserError if unpatched."""
    return _patch_of(model).config


def sibling_penalty(model: nn.Module) -> float:
    """The number subtracted from attention scores of siblings; 0 for a model that is not patched."""
    return effective_penalty(rope_config(model)) if is_patched(model) else 0.0


def _patch_of(model: nn.Module) -> _Patch:
    state = getattr(model, "_pos2d", None)
    if not isinstance(state, _Patch):
        raise UserError(
            "model: is not patched; call patch(model, RopeConfig(...)) or load_model_with_lora first"
        )
    return state


def _before_forward(
    positions: Positions, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Remove pos2d from the call. A nested call without pos2d inherits that of the enclosing call."""
    if "pos2d" not in kwargs:
        forward_context.push(None, inherit=True)
        return args, kwargs
    kwargs = dict(kwargs)
    pos2d = kwargs.pop("pos2d")
    forward_context.push(pos2d, inherit=False)
    if pos2d is not None:
        if kwargs.get("attention_mask") is None:
            raise ValueError(
                "attention_mask: pos2d needs the mask of its layout; build it with parallelmind.model.mask"
            )
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = _position_ids(positions, pos2d, kwargs.get("past_key_values"))
    return args, kwargs


def _position_ids(positions: Positions, pos2d: Tensor, past_key_values: Any) -> Tensor:
    """`[batch, seq]` 1D positions for a call that passes only pos2d."""
    if positions == "time":
        return pos2d[..., 1]
    start = past_key_values.get_seq_length() if past_key_values is not None else 0
    return torch.arange(start, start + pos2d.shape[1], device=pos2d.device).expand(pos2d.shape[:2])


def _after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    forward_context.pop()
