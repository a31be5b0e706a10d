"""The weights that training changes, by the names under which they are saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import peft
import torch
from peft import PeftModel
from torch import Tensor, nn

from parallelmind.errors import UserError
from parallelmind.model.shards import copy_full

ADAPTER = "default"  # peft's name for a model's first adapter


def trained_weights(model: nn.Module, name: str = ADAPTER) -> dict[str, Tensor]:
    """The weights of an adapter, or all parameters of a model without one; each tied weight once.

    The tensors share the model's memory.
    """
    if isinstance(model, PeftModel):
        # By default peft asks the hub whether the embeddings were resized.
        return peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {name: weight.detach() for name, weight in model.named_parameters()}


@torch.no_grad()
def load_weights(
    model: nn.Module, saved: Mapping[str, Tensor], origin: str | Path, name: str = ADAPTER
) -> None:
    """Copy all saved weights into the model, or into its adapter `name`, without renaming.

    peft's own loading renames weights as transformers does for old checkpoints, and only warns about missing
    ones. Raises UserError, which begins with `origin`, where names or shapes differ.
    """
    weights = trained_weights(model, name)
    check_shapes(weights, {key: weight.shape for key, weight in saved.items()}, origin)
    for key, weight in weights.items():
        copy_full(weight, saved[key])


def check_shapes(
    weights: Mapping[str, Tensor], saved_shapes: Mapping[str, torch.Size], origin: str | Path
) -> None:
    """Raise UserError, which begins with `origin`, where names or shapes differ from the saved ones."""
    shapes = {key: weight.shape for key, weight in weights.items()}
    if shapes != saved_shapes:
        keys = shapes.keys() | saved_shapes.keys()
        mismatch = min(key for key in keys if shapes.get(key) != saved_shapes.get(key))
        here, there = (
            list(group[mismatch]) if mismatch in group else "missing" for group in (shapes, saved_shapes)
        )
        raise UserError(
            f"{origin}: its weights and the model's differ in {mismatch} ({there} in the files, {here} "
            "in the model); load the base they were trained on, or copy the files again"
        )


def to_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, as safetensors takes them."""
    return {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
