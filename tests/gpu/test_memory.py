"""A step never holds logits of tokens without target, nor a dense mask of a long sequence."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from flexing import LargestTensor, flex_always_chosen, gradients, long_batch
from tiny import tiny_llama

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.model.adapter import add_lora
from parallelmind.model.patch import patch

VOCABULARY = 32_000


def peak_bytes(device: str, work: Callable[[], object]) -> int:
    """Peak memory of the second call of `work`, in bytes above the start; on a CPU, the largest tensor."""
    if device == "cpu":
        with LargestTensor() as largest:
            work()
        return largest.bytes
    work()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def patched_with_adapter(device: str, config: RopeConfig, vocabulary: int) -> torch.nn.Module:
    model = tiny_llama(vocab_size=vocabulary, max_position_embeddings=32768, attn_implementation="sdpa")
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    patch(model, config)
    return add_lora(model, LoraConfig(lora_rank=2), seed=0).train()


def test_only_targets_have_logits(device):
    config = RopeConfig()
    batch = long_batch(config, [(4000 if device == "cuda" else 1000, (16, 16))], device=device)
    model = patched_with_adapter(device, config, VOCABULARY)
    peak = peak_bytes(device, lambda: gradients(model, batch, config.visibility, model.dtype))
    assert peak < batch.ids.numel() * VOCABULARY * 4


@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
def test_a_long_sequence_has_no_dense_mask(device, visibility):
    config = RopeConfig(visibility=visibility)
    shape = (8192, (1024,) * 8) if device == "cuda" else (300, (50,) * 8)
    batch = long_batch(config, [shape], device=device)
    model = patched_with_adapter(device, config, vocabulary=128)
    with flex_always_chosen():
        if device == "cpu":
            gradients(model, batch, visibility)
            pytest.skip("the uncompiled kernel stores the score of every pair")
        peak = peak_bytes(device, lambda: gradients(model, batch, visibility, model.dtype))
    assert peak < 2 * batch.ids.shape[1] ** 2  # the size of one dense mask in bfloat16
