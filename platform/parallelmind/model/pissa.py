"""PiSSA: an adapter that starts as the leading singular directions of the weights, which the base lacks while
it trains.

It is saved as a plain adapter of twice the rank for the untouched base: what it became, less what it started
as.
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
from parallelmind.model.weights import trained_weights

_START = "_pissa_start"
_SPARE, _ITERATIONS = 8, 16  # directions sought beside those wanted, which sharpens them


def initialize_pissa(model: PeftModel) -> None:
    """Move the leading directions of every adapted weight from the base into the adapter; the model computes
    what it did.

    The same weights and the same seed of the global generator give the same start bit for bit. Raises
    UserError, with nothing changed, for a layer that cannot be split.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    weights = [weight for _, weight in model.named_parameters(remove_duplicate=False)]
    for name, layer in layers.items():
        _refuse(name.removeprefix("base_model.model."), layer, weights)
    for layer in layers.values():
        _split(layer)
    initial = {name: weight.detach().cpu().clone() for name, weight in trained_weights(model).items()}
    object.__setattr__(model, _START, initial)


def _refuse(name: str, layer: LoraLayer, weights: list[nn.Parameter]) -> None:
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
    rank, most = max(layer.r.values()), min(base.weight.shape)
    if rank > most:
        raise UserError(
            f"lora_rank={rank}: lora_init=pissa takes at most the {most} directions of {name}; lower it"
        )


@torch.no_grad()
def _split(layer: LoraLayer) -> None:
    """Leave in the weight W what `scale * B @ A` does not hold. In float64, so that the order of summation
    hardly shows.
    """
    name = layer.active_adapters[0]
    base, scale, rank = layer.get_base_layer(), layer.scaling[name], layer.r[name]
    a, b, weight = (cast(Tensor, part.weight) for part in (layer.lora_A[name], layer.lora_B[name], base))
    if isinstance(base, Conv1D):
        weight = weight.T  # now [out, in] like any other
    # Power iterations find the few directions that are wanted in seconds, where all of them would take
    # minutes.
    left, values, right = torch.svd_lowrank(
        weight.double(), q=min(rank + _SPARE, *weight.shape), niter=_ITERATIONS
    )
    root = (values[:rank] / scale).sqrt()
    a.copy_((right[:, :rank] * root).T)
    b.copy_(left[:, :rank] * root)
    weight.copy_(weight.double() - scale * b.double() @ a.double())


def to_plain_lora(
    model: PeftModel, weights: Mapping[str, Tensor], lora: LoraConfig
) -> tuple[Mapping[str, Tensor], LoraConfig]:
    """An adapter for the untouched base that does what `weights` do on the model's own, and its settings.

    B A - B0 A0 = [B, -B0] [A; A0], and B makes up for the scale, which falls with the rank. It is as exact as
    the base's own type: a bfloat16 base was rounded once more when it was split.
    """
    initial: Mapping[str, Tensor] | None = getattr(model, _START, None)
    if initial is None:
        return weights, lora
    lost = 2**0.5 if lora.use_rslora else 2
    plain = dict(weights)  # magnitudes of DoRA are those of the same sum
    for name, weight in weights.items():
        if "lora_A" in name:
            plain[name] = torch.cat([weight, initial[name].to(weight.device)])
        elif "lora_B" in name:
            plain[name] = torch.cat([weight, -initial[name].to(weight.device)], dim=1) * lost
    return plain, lora.model_copy(update={"lora_init": "zero", "lora_rank": 2 * lora.lora_rank})
