"""Teach a Hugging Face causal LM the two coordinates of pos2d, in place and reversibly.

Its rotary modules learn to mix coordinates (`rotary`), and hooks on the model take `pos2d` out of the call
and carry it there (`coordinates`): `model(..., pos2d=…)`. Without `pos2d` a call is a lone branch at
coordinate 0 whose time is `position_ids`. No model is named anywhere: what cannot be patched is told from its
structure (`support`).
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
from parallelmind.model import forward_context as coordinates
from parallelmind.model import rotary
from parallelmind.model.structure import decoder
from parallelmind.model.support import check_supported
from parallelmind.visibility import effective_penalty


@dataclass(frozen=True, slots=True)
class _Patch:
    """What a patched model carries: its settings, and the hooks to take away again."""

    config: RopeConfig
    handles: tuple[RemovableHandle, ...]


def patch(model: PreTrainedModel, config: RopeConfig) -> None:
    """Patch in place. Raises UserError, with nothing changed, if the model is patched already or cannot hold
    branches.
    """
    if is_patched(model):
        raise UserError("model: is patched already; unpatch it first")
    check_supported(model)
    if config.rope_2d_ratio > 0:
        rotary.patch_rotary(model, config)
    handles = []
    # peft calls the whole model's forward past its hooks, training calls the decoder alone: both take pos2d.
    for entrance in (model, decoder(model)):
        handles.append(
            entrance.register_forward_pre_hook(partial(_enter, config.positions), with_kwargs=True)
        )
        handles.append(entrance.register_forward_hook(_leave, always_call=True))
    object.__setattr__(model, "_pos2d", _Patch(config, tuple(handles)))


def unpatch(model: PreTrainedModel) -> None:
    """Undo `patch`: classes, buffers and hooks are as they were. Raises UserError if the model is not
    patched.
    """
    for handle in _patch_of(model).handles:
        handle.remove()
    rotary.unpatch_rotary(model)
    object.__delattr__(model, "_pos2d")


def is_patched(model: nn.Module) -> bool:
    return getattr(model, "_pos2d", None) is not None


def rope_config(model: nn.Module) -> RopeConfig:
    """The settings that the model (or the model inside a PeftModel) was patched with."""
    return _patch_of(model).config


def sibling_penalty(model: nn.Module) -> float:
    """What is taken off the attention scores of siblings; nothing in a model that is not patched."""
    return effective_penalty(rope_config(model)) if is_patched(model) else 0.0


def _patch_of(model: nn.Module) -> _Patch:
    found = getattr(model, "_pos2d", None)
    if not isinstance(found, _Patch):
        raise UserError(
            "model: is not patched; call patch(model, RopeConfig(...)) or load_model_with_lora first"
        )
    return found


def _enter(
    positions: Positions, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Take pos2d out of the call; what it is nested in keeps its own."""
    if "pos2d" not in kwargs:
        coordinates.push(None, inherit=True)
        return args, kwargs
    kwargs = dict(kwargs)
    pos2d = kwargs.pop("pos2d")
    coordinates.push(pos2d, inherit=False)
    if pos2d is not None:
        if kwargs.get("attention_mask") is None:
            raise ValueError(
                "attention_mask: pos2d needs the mask of its layout; build it with parallelmind.model.mask"
            )
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = _positions(positions, pos2d, kwargs.get("past_key_values"))
    return args, kwargs


def _positions(positions: Positions, pos2d: Tensor, past: Any) -> Tensor:
    """`[batch, seq]` 1D positions of a call that names only pos2d."""
    if positions == "time":
        return pos2d[..., 1]
    start = past.get_seq_length() if past is not None else 0
    return torch.arange(start, start + pos2d.shape[1], device=pos2d.device).expand(pos2d.shape[:2])


def _leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    coordinates.pop()
