"""Find the parts of a Hugging Face model, independently of their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from parallelmind.errors import UserError, first_line
from parallelmind.hardware import require_gpu

_TOWERS = ("vision", "visual", "image", "audio")


def to_gpu(model: Any) -> Any:
    """Move the model to this process's GPU. Quantised weights are already there.

    Raises UserError if torch cannot use one.
    """
    require_gpu()
    return model.cuda() if model.device.type == "cpu" else model


def to_device(model: Any, device: str) -> Any:
    """Move the model to a device. Raises UserError for one that this machine does not have.

    Quantised weights stay where they are.
    """
    if getattr(causal_lm(model), "quantization_method", None) is not None:
        return model
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={device}: {first_line(error).rstrip('.')}; give cpu, or a device that torch sees here"
        ) from error


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside of PeftModel and DDP."""
    inner = getattr(model, "module", model)
    return cast(PreTrainedModel, inner.get_base_model() if isinstance(inner, PeftModel) else inner)


def decoder_name(model: PreTrainedModel) -> str:
    """The name of the child that turns token ids into hidden states."""
    return next(name for name, child in model.named_children() if isinstance(child, PreTrainedModel))


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The child that turns token ids into hidden states."""
    return cast(PreTrainedModel, getattr(model, decoder_name(model)))


def text_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by name, except those of vision and audio towers."""
    return {
        name: module for name, module in model.named_modules() if not any(tower in name for tower in _TOWERS)
    }


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context in which a model that is in train mode is in eval mode, module by module."""
    in_training = model.training or causal_lm(model).training
    modules = [module for module in model.modules() if module.training] if in_training else []
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module in modules:
            module.training = True
