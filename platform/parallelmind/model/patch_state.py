"""Which models are patched, and with which settings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.utils.hooks import RemovableHandle

from parallelmind.config import RopeConfig
from parallelmind.errors import UserError
from parallelmind.model.hf_compat import OwnAttention
from parallelmind.visibility import effective_penalty

ATTRIBUTE = "_pos2d"  # of a patched model


@dataclass(frozen=True, slots=True)
class PatchState:
    """State of a patched model. attention: None where the model keeps transformers' attention."""

    config: RopeConfig
    hooks: tuple[RemovableHandle, ...]
    attention: OwnAttention | None


def is_patched(model: nn.Module) -> bool:
    """Whether the model (or the model inside a PeftModel) is patched."""
    return getattr(model, ATTRIBUTE, None) is not None


def patch_state(model: nn.Module) -> PatchState:
    """The state of a patched model, or of the one inside a PeftModel. Raises UserError if unpatched."""
    state = getattr(model, ATTRIBUTE, None)
    if not isinstance(state, PatchState):
        raise UserError(
            "model: is not patched; call patch(model, RopeConfig(...)) or load_model_with_lora first"
        )
    return state


def rope_config(model: nn.Module) -> RopeConfig:
    """The settings of a patched model, or of the one inside a PeftModel. Raises UserError if unpatched."""
    return patch_state(model).config


def sibling_penalty(model: nn.Module) -> float:
    """The number subtracted from attention scores of siblings; 0 for a model that is not patched."""
    return effective_penalty(rope_config(model)) if is_patched(model) else 0.0
