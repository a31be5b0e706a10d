"""Finding one's way in a Hugging Face model, whatever its parts are called."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

_TOWERS = ("vision", "visual", "image", "audio")


def to_gpu(model: Any) -> Any:
    """The model on this process's GPU. Weights in few bits are there already."""
    return model.cuda() if model.device.type == "cpu" else model


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside, whatever wraps it (PeftModel, and DDP around that)."""
    inner = getattr(model, "module", model)
    return cast(PreTrainedModel, inner.get_base_model() if isinstance(inner, PeftModel) else inner)


def decoder_name(model: PreTrainedModel) -> str:
    """The name of the part that turns token ids into hidden states; the head is the rest."""
    return next(name for name, part in model.named_children() if isinstance(part, PreTrainedModel))


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    return cast(PreTrainedModel, getattr(model, decoder_name(model)))


def text_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name, but those of vision and audio towers."""
    return {
        name: module for name, module in model.named_modules() if not any(tower in name for tower in _TOWERS)
    }
