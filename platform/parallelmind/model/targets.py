"""Which layers of a model LoRA may adapt."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from parallelmind.errors import UserError
from parallelmind.model.hf_compat import is_stateful
from parallelmind.model.structure import text_modules


def excluded_modules(model: PreTrainedModel, every: bool) -> list[str]:
    """Linear layers that LoRA must leave alone: those of other towers, which text never passes. Where every
    layer is asked for, also routers of experts, which are built as linear layers but return more than one
    tensor, and the last layer of a recurrent mixer, whose kernels read the weight past the layer.
    """
    text = text_modules(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    odd = {name for name in linears if name not in text}
    if every:
        fused = "out_proj" if is_stateful(model) else None
        odd |= {
            name for name, module in linears.items() if name.rpartition(".")[2] == fused or _is_router(module)
        }
    return sorted(odd)


@torch.no_grad()
def _is_router(linear: nn.Linear) -> bool:
    if (
        type(linear).forward is nn.Linear.forward or not linear.weight.is_floating_point()
    ):  # a quantised layer is plain
        return False
    probe = torch.zeros(1, linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
    return not isinstance(linear(probe), Tensor)


def parse_targets(model: nn.Module, given: str) -> list[str]:
    """The layers named in a comma-separated list. Raises UserError for one that the model does not have.

    peft is content when one name of several matches, so a misspelt one would be left out in silence.
    """
    targets = [name.strip() for name in given.split(",") if name.strip()]
    parameters = model.named_parameters(remove_duplicate=False)
    layers = [name.removesuffix(".weight") for name, weight in parameters if weight.dim() == 2]
    unknown = [
        target
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in layers)
    ]
    if unknown or not targets:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        missing = ", ".join(unknown) or "that"
        raise UserError(
            f"lora_targets={given}: no layer is named {missing}; choose from {known}, or all-linear"
        )
    return targets
