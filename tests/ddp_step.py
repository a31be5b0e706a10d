"""One of two processes that compare the gradients of DistributedDataParallel with those of one process.

Each process computes one half of a batch, and the whole batch without DistributedDataParallel.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from families import variant
from torch.nn.parallel import DistributedDataParallel

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.evaluation.probes import BRANCHES, MAIN
from parallelmind.layout import Tokens, arrange, collate
from parallelmind.model.adapter import add_lora
from parallelmind.model.inputs import decoder_inputs, to_tensors
from parallelmind.model.patch import patch

CONFIG = RopeConfig()


def lora_gradients(
    model: torch.nn.Module, forward_model: torch.nn.Module, mains: list[list[int]]
) -> torch.Tensor:
    """LoRA gradients of one step. forward_model: `model`, or its DistributedDataParallel wrapper."""
    samples = [arrange(Tokens.of(main, BRANCHES), CONFIG) for main in mains]
    inputs = decoder_inputs(model.get_base_model(), to_tensors(collate(samples, pad_id=0)), CONFIG.visibility)
    model.zero_grad()
    forward_model(**inputs).logits.log_softmax(-1)[..., 5].mean().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    halves = [[MAIN], [MAIN[::-1]]]
    for family in ("shared", "in each attention"):
        model = variant(family)
        patch(model, CONFIG)
        adapted = add_lora(model, LoraConfig(lora_rank=2), seed=0)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(weight, 0.1)
        expected = lora_gradients(adapted, adapted, halves[0] + halves[1])
        actual = lora_gradients(adapted, DistributedDataParallel(adapted), halves[dist.get_rank()])
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    print("gradients agree", flush=True)
    os._exit(0)  # a thread of Gloo that frees a tensor while Python ends would abort the process
