"""The weights that training changes, by the names they are saved under."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from peft import PeftModel
from torch import Tensor, nn

from parallelmind.errors import UserError

ADAPTER = "default"  # what peft calls a model's first adapter


def trained_weights(model: nn.Module, name: str = ADAPTER) -> dict[str, Tensor]:
    """An adapter's weights, or all parameters of a model without one, tied ones once. They share the model's
    memory.
    """
    if isinstance(model, PeftModel):
        # Left to choose, peft asks the hub whether the embeddings were resized.
        return peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {name: weight.detach() for name, weight in model.named_parameters()}


@torch.no_grad()
def load_weights(
    model: nn.Module, saved: Mapping[str, Tensor], origin: str | Path, name: str = ADAPTER
) -> None:
    """Copy saved weights into the model (into its adapter of this name), all of them and by their own names.

    peft's own loading renames them as transformers renames old base checkpoints, and only warns of those that
    it loses. Raises UserError, which begins with `origin`, where names or shapes are not the same.
    """
    own = trained_weights(model, name)
    expected, found = ({name: weight.shape for name, weight in weights.items()} for weights in (own, saved))
    if expected != found:
        odd = min(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise UserError(
            f"{origin}: its weights and the model's do not agree on {odd}; load the base they were trained on"
        )
    for name, weight in own.items():
        weight.copy_(saved[name])


def to_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same on the CPU, in the form that safetensors takes."""
    return {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
