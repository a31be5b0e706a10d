"""PiSSA: an adapter initialised with the leading singular directions of the weights.

While it trains, the base's weights lack these directions. It is saved as a plain adapter of twice the rank
for the unchanged base: its final weights minus its initial ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from parallelmind.config import LoraConfig
from parallelmind.errors import UserError
from parallelmind.model.shards import copy_full, to_full
from parallelmind.model.weights import trained_weights

_INITIAL_WEIGHTS = "_pissa_initial_weights"
_OVERSAMPLING, _ITERATIONS = 8, 16  # of the randomised singular value decomposition


def initialize_pissa(model: PeftModel) -> None:
    """Move the leading directions of every adapted weight from the base into the adapter.

    The model's output stays the same. The same weights and the same seed of the global generator give the
    same result bit for bit. Raises UserError, with nothing changed, for a layer that cannot be split.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    weights = [weight for _, weight in model.named_parameters(remove_duplicate=False)]
    for name, layer in layers.items():
        _check_layer(name.removeprefix("base_model.model."), layer, weights)
    for layer in layers.values():
        _split(layer)
    initial = {name: weight.detach().cpu().clone() for name, weight in trained_weights(model).items()}
    object.__setattr__(model, _INITIAL_WEIGHTS, initial)


def _check_layer(name: str, layer: LoraLayer, weights: list[nn.Parameter]) -> None:
    base = layer.get_base_layer()
    if not isinstance(base, (nn.Linear, Conv1D)) or not base.weight.is_floating_point():
        kind = type(base).__name__
        raise UserError(
            f"lora_init=pissa: cannot split {name} ({kind}); set lora_init=zero or choose other lora_targets"
        )
    if sum(weight is base.weight for weight in weights) > 1:
        raise UserError(
            f"lora_init=pissa: {name} shares its weight with another layer; leave it out of lora_targets"
        )
    rank, max_rank = max(layer.r.values()), min(base.weight.shape)
    if rank > max_rank:
        raise UserError(f"lora_rank={rank}: lora_init=pissa allows at most {max_rank} for {name}; lower it")


@torch.no_grad()
def _split(layer: LoraLayer) -> None:
    """Set A and B to the leading directions of the weight W and subtract `scale * B @ A` from W.

    Computed in float64, so that the order of summation has little effect.
    """
    name = layer.active_adapters[0]
    base, scale, rank = layer.get_base_layer(), layer.scaling[name], layer.r[name]
    a, b = (cast(Tensor, module.weight) for module in (layer.lora_A[name], layer.lora_B[name]))
    base_weight = cast(Tensor, base.weight)
    full = to_full(base_weight)
    weight = full.T if isinstance(base, Conv1D) else full  # [out, in]
    # Power iterations find the leading directions in seconds. A full decomposition takes minutes.
    left, values, right = torch.svd_lowrank(
        weight.double(), q=min(rank + _OVERSAMPLING, *weight.shape), niter=_ITERATIONS
    )
    root = (values[:rank] / scale).sqrt()
    a.copy_((right[:, :rank] * root).T)
    b.copy_(left[:, :rank] * root)
    weight.copy_(weight.double() - scale * b.double() @ a.double())
    copy_full(base_weight, full)


def to_plain_lora(
    model: PeftModel, weights: Mapping[str, Tensor], lora: LoraConfig
) -> tuple[Mapping[str, Tensor], LoraConfig]:
    """The adapter for the unchanged base that is equivalent to `weights` on the split base, and its settings.

    B A - B0 A0 = [B, -B0] [A; A0]; B is multiplied by the factor by which the scale falls with the higher
    rank. The result is as exact as the base's dtype: splitting rounded a bfloat16 base once more.
    """
    initial: Mapping[str, Tensor] | None = getattr(model, _INITIAL_WEIGHTS, None)
    if initial is None:
        return weights, lora
    scale_ratio = 2**0.5 if lora.use_rslora else 2
    plain = dict(weights)  # magnitudes of DoRA stay: the sum of base and adapter is the same
    for name, weight in weights.items():
        if "lora_A" in name:
            plain[name] = torch.cat([weight, initial[name].to(weight.device)])
        elif "lora_B" in name:
            plain[name] = torch.cat([weight, -initial[name].to(weight.device)], dim=1) * scale_ratio
    return plain, lora.model_copy(update={"lora_init": "zero", "lora_rank": 2 * lora.lora_rank})
