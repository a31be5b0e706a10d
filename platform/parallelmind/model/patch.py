"""Patch a Hugging Face causal LM for pos2d, in place and reversibly: `model(..., pos2d=…)`.

Rotary modules mix the coordinates (`rotary`), and hooks remove `pos2d` from the call and pass it to them
(`forward_context`). A call without `pos2d` is a single branch at coordinate 0 whose time is `position_ids`.
No model is named anywhere: whether a model can be patched is decided by its structure (`support`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from parallelmind.config import Positions, RopeConfig
from parallelmind.errors import UserError
from parallelmind.model import forward_context
from parallelmind.model.branch_embedding import (
    add_branch_embeddings,
    branch_embeddings,
    remove_branch_embeddings,
    with_branches,
)
from parallelmind.model.hf_compat import OwnAttention, compares_attention_name, hands_over_masks
from parallelmind.model.patch_state import ATTRIBUTE, PatchState, is_patched, patch_state, rope_config
from parallelmind.model.penalty import add_penalties, check_takes_penalties, remove_penalties
from parallelmind.model.rotary import frequency_limit, patch_rotary, unpatch_rotary
from parallelmind.model.structure import decoder
from parallelmind.model.support import check_supported
from parallelmind.model.tree_inputs import LAYOUT, replace_layout
from parallelmind.visibility import learns_penalty


def patch(model: PreTrainedModel, config: RopeConfig) -> None:
    """Patch `model` in place.

    Raises UserError, with nothing changed, if the model is already patched or cannot hold branches.
    """
    if is_patched(model):
        raise UserError("model: is already patched; unpatch it first")
    check_supported(model)
    check_takes_penalties(model, config)
    if config.rope_2d_ratio > 0 or frequency_limit(model) is not None:
        patch_rotary(model, config)
    hooks = []
    # Both take pos2d: peft calls the model's forward without its hooks, and training calls the decoder alone.
    for module in (model, decoder(model)):
        hooks.append(module.register_forward_pre_hook(partial(_before_forward, model), with_kwargs=True))
        hooks.append(module.register_forward_hook(_after_forward, always_call=True))
    attention = None
    if hands_over_masks(model) and not compares_attention_name(model):
        attention = OwnAttention(model)
        attention.acquire()
    if learns_penalty(config):
        hooks += add_penalties(model)
    if config.branch_embeddings:
        hooks.append(add_branch_embeddings(model, config))
    object.__setattr__(model, ATTRIBUTE, PatchState(config, tuple(hooks), attention))


def unpatch(model: PreTrainedModel) -> None:
    """Undo `patch`: classes, buffers, hooks and configuration are restored. Raises UserError if unpatched."""
    state = patch_state(model)
    for hook in state.hooks:
        hook.remove()
    if state.attention is not None:
        state.attention.release()
    unpatch_rotary(model)
    remove_penalties(model)
    remove_branch_embeddings(model)
    object.__delattr__(model, ATTRIBUTE)


def _before_forward(
    model: PreTrainedModel, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Remove pos2d and what else describes the layout from a call of the patched model or of its decoder.

    A nested call without pos2d inherits that of the enclosing call.
    """
    if not any(name in kwargs for name in LAYOUT):
        forward_context.push_nested()
        return args, kwargs
    kwargs = dict(kwargs)
    embeddings = branch_embeddings(model, kwargs.get("pos2d"))
    forward_context.push(kwargs.get("pos2d"), embeddings)
    if kwargs.get("inputs_embeds") is not None:
        kwargs["inputs_embeds"] = with_branches(kwargs["inputs_embeds"], embeddings)
    replace_layout(model, kwargs)
    pos2d = kwargs.pop("pos2d")
    if pos2d is not None:
        if kwargs.get("attention_mask") is None:
            raise UserError(
                "attention_mask: pos2d needs the mask of its layout; pass segment and relations, as "
                "tree_batch returns them, or a mask of parallelmind.model.mask"
            )
        if kwargs.get("position_ids") is None:
            positions = rope_config(model).positions
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
