"""Tokens/s and FLOP/s of a LoRA step on one GPU.

The models have the shapes of Qwen2.5 and random weights, so nothing is downloaded; speed does not depend on
the values of weights. Batches are as large as memory allows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from benchmarks.harness import seconds
from parallelmind.config import LoraConfig, OptimizerConfig, RopeConfig, Visibility
from parallelmind.data.packing import make_batch
from parallelmind.errors import UserError
from parallelmind.layout import Batch, Tokens
from parallelmind.model.adapter import add_lora
from parallelmind.model.inputs import to_tensors
from parallelmind.model.mask import AttentionBias
from parallelmind.model.patch import patch
from parallelmind.model.structure import causal_lm, decoder
from parallelmind.training.loss import TargetLoss
from parallelmind.training.step import accumulate_gradients, make_optimizer, optimizer_step

# Dense bfloat16 FLOP/s of the data sheet, by a word of the device name.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}
_BRANCHES, _STEPS = 8, 5


@dataclass(frozen=True, slots=True)
class Shape:
    """A model configuration, and whether activation checkpointing is on."""

    config: Qwen2Config
    checkpointing: bool


@dataclass(frozen=True, slots=True)
class Workload:
    """Shape of a sample: tokens of main and of each of eight branches. `rows`: the largest batch tried."""

    visibility: Visibility
    main: int
    branch: int
    rows: int


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens/s without padding, and FLOP/s without recomputation."""

    tokens: float
    flops: float


def qwen(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool
) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "05b": Shape(qwen(151936, 896, 4864, 24, 14, 2, tied=True), checkpointing=False),
    "7b": Shape(qwen(152064, 3584, 18944, 28, 28, 4, tied=False), checkpointing=True),
}
WORKLOADS = {
    "": Workload("columnar", 1024, 128, rows=32),
    "_isolated": Workload("isolated", 1024, 128, rows=32),
    "_long": Workload("columnar", 4096, 512, rows=8),
    "_long_isolated": Workload("isolated", 4096, 512, rows=8),
}


def build(shape: Shape, device: str) -> nn.Module:
    """Build a patched bfloat16 model with LoRA on every linear layer, directly on the device."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16)
        patch(model, RopeConfig())
        if shape.checkpointing:
            model.activation_checkpointing_enable()
        return add_lora(model, LoraConfig(), seed=0).train()


def random_batch(work: Workload, rows: int, vocabulary: int) -> Batch:
    """Return a batch of `rows` samples of random tokens."""
    random = np.random.default_rng(0)
    lengths = [work.main, *[work.branch] * _BRANCHES]
    texts = [[random.integers(0, vocabulary, length).tolist() for length in lengths] for _ in range(rows)]
    return make_batch(
        [Tokens.of(text[0], text[1:]) for text in texts],
        RopeConfig(visibility=work.visibility),
        pad_id=0,
    )


def step_flops(model: PreTrainedModel, batch: Batch, visibility: Visibility) -> float:
    """FLOPs of the matrix products of one step, without recomputation.

    Per token and weight: 2 forward, 2 for the gradient of the input, 2 for the gradient of a trained weight.
    The LM head runs on target tokens only. Per visible pair of tokens and head dimension: 2 for the score and
    2 for the value, twice that in the backward pass.
    """
    config, body = model.config, decoder(model)
    weights = [module.weight for module in body.modules() if isinstance(module, nn.Linear)]
    per_token = sum(weight.numel() * (6 if weight.requires_grad else 4) for weight in weights)
    head = config.vocab_size * config.hidden_size
    bias = AttentionBias(to_tensors(batch).placement, visibility).whole()
    pairs = int((bias > -torch.inf).sum())
    attention = 12 * pairs * config.num_hidden_layers * config.hidden_size
    return batch.tokens * per_token + batch.targets * 4 * head + attention


def measure(model: nn.Module, work: Workload) -> Speed:
    """Measure steps on the largest batch that fits, after one warm-up step.

    Raises:
        UserError: A batch of one sample does not fit.
    """
    inner = causal_lm(model)
    loss = TargetLoss(model, work.visibility, torch.bfloat16)
    optimizer = make_optimizer(loss, OptimizerConfig())

    def step(batch: Batch) -> float:
        totals, _ = accumulate_gradients(loss, iter([batch]), 1)
        return optimizer_step(loss, optimizer, totals.targets, clip=1.0).item()

    batch = _largest_batch(step, work, inner.config.vocab_size)
    step_s = seconds(lambda: [step(batch) for _ in range(_STEPS)]) / _STEPS
    return Speed(batch.tokens / step_s, step_flops(inner, batch, work.visibility) / step_s)


def _largest_batch(step: Callable[[Batch], float], work: Workload, vocabulary: int) -> Batch:
    """Halve the batch until a step on it fits into memory."""
    rows = work.rows
    while True:
        batch = random_batch(work, rows, vocabulary)
        try:
            step(batch)
            return batch
        except (UserError, torch.OutOfMemoryError) as error:
            if rows == 1 or not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
                raise
        torch.cuda.empty_cache()
        rows //= 2


def peak(device: str) -> float | None:
    """Peak FLOP/s of a GPU by its device name; None if it is not in the table."""
    return next((_PEAK_FLOPS[word] for word in re.split(r"[\s-]+", device) if word in _PEAK_FLOPS), None)
