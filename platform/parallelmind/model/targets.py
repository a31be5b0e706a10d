"""The layers of a model that LoRA adapts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from parallelmind.errors import UserError
from parallelmind.model.hf_compat import is_stateful
from parallelmind.model.structure import text_modules


def excluded_modules(model: PreTrainedModel, all_linear: bool) -> list[str]:
    """Names of linear layers that LoRA must not adapt.

    Layers of vision and audio towers are excluded. With `all_linear`, so are routers of experts, which are
    linear layers that return several tensors, and the output projection of a recurrent mixer, whose kernels
    read the weight without calling the layer.
    """
    text = text_modules(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    excluded = {name for name in linears if name not in text}
    if all_linear:
        fused = "out_proj" if is_stateful(model) else None
        excluded |= {
            name for name, module in linears.items() if name.rpartition(".")[2] == fused or _is_router(module)
        }
    return sorted(excluded)


@torch.no_grad()
def _is_router(linear: nn.Linear) -> bool:
    is_quantised = not linear.weight.is_floating_point()  # a quantised layer is not a router
    if type(linear).forward is nn.Linear.forward or is_quantised:
        return False
    probe = torch.zeros(1, linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
    return not isinstance(linear(probe), Tensor)


def parse_targets(model: nn.Module, lora_targets: str) -> list[str]:
    """The layer names in a comma-separated list. Raises UserError for a name that the model does not have.

    peft accepts a list if one of its names matches, so it would silently ignore a misspelt name.
    """
    targets = [name.strip() for name in lora_targets.split(",") if name.strip()]
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
            f"lora_targets={lora_targets}: no layer is named {missing}; choose from {known}, or all-linear"
        )
    return targets
