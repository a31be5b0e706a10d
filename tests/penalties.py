"""Models that learn their sibling penalty, each head with a number of its own."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.model.adapter import add_lora
from parallelmind.model.patch import patch
from parallelmind.model.penalty import penalty_weights

LEARNED = RopeConfig(sibling_penalty="learned")
LORA = LoraConfig(lora_rank=2)


@torch.no_grad()
def learning(model: PreTrainedModel, rope: RopeConfig = LEARNED, seed: int = 0) -> PeftModel:
    """The model patched, with an adapter that changes its logits and whose penalties are all different."""
    patch(model, rope)
    adapted = add_lora(model, LORA, seed)
    random = torch.Generator().manual_seed(seed)
    for weight in penalty_weights(adapted):
        weight.uniform_(-0.5, 4, generator=random)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.normal_(0, 0.1, generator=random)
    return adapted
