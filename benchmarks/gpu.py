"""`make bench-gpu`: a LoRA step on one GPU, in tokens per second and as a share of what the GPU can compute;
and decoding.

The models have the shapes of Qwen2.5 and random weights, so nothing is downloaded; speed does not depend on
what weights say. Batches are as large as memory allows.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from benchmarks import gpu_decoding, harness
from benchmarks.harness import Bench, seconds
from parallelmind.config import LoraConfig, OptimizerConfig, RopeConfig, Visibility
from parallelmind.data.packing import make_batch
from parallelmind.errors import UserError
from parallelmind.layout import Batch, Tokens
from parallelmind.model.adapter import add_lora
from parallelmind.model.mask import visible
from parallelmind.model.patch import patch
from parallelmind.model.structure import causal_lm, decoder
from parallelmind.training.loss import TargetLoss, to_tensors
from parallelmind.training.step import accumulate_gradients, make_optimizer, optimizer_step

# Dense bfloat16 FLOP/s by a word of the device's name, as its maker states them.
_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}
_BRANCHES, _STEPS = 8, 5


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to build, and whether its activations are recomputed."""

    config: Qwen2Config
    checkpointing: bool


@dataclass(frozen=True, slots=True)
class Work:
    """What a sample is: main and eight branches of so many tokens. rows: the largest batch to try."""

    visibility: Visibility
    main: int
    branch: int
    rows: int


@dataclass(frozen=True, slots=True)
class Speed:
    """tokens: per second, padding left out. flops: per second, recomputation left out."""

    tokens: float
    flops: float


def _qwen(
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
    "05b": Shape(_qwen(151936, 896, 4864, 24, 14, 2, tied=True), checkpointing=False),
    "7b": Shape(_qwen(152064, 3584, 18944, 28, 28, 4, tied=False), checkpointing=True),
}
WORKS = {
    "": Work("columnar", 1024, 128, rows=32),
    "_isolated": Work("isolated", 1024, 128, rows=32),
    "_long": Work("columnar", 4096, 512, rows=8),
    "_long_isolated": Work("isolated", 4096, 512, rows=8),
}


def build(shape: Shape, device: str) -> nn.Module:
    """A patched bfloat16 model with LoRA on every linear layer, built where it will run."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.bfloat16)
        patch(model, RopeConfig(sibling_penalty=0))
        if shape.checkpointing:
            model.activation_checkpointing_enable()
        return add_lora(model, LoraConfig(), seed=0).train()


def random_batch(work: Work, rows: int, vocabulary: int) -> Batch:
    random = np.random.default_rng(0)
    lengths = [work.main, *[work.branch] * _BRANCHES]
    texts = [[random.integers(0, vocabulary, length).tolist() for length in lengths] for _ in range(rows)]
    return make_batch(
        [Tokens.of(text[0], text[1:]) for text in texts],
        RopeConfig(visibility=work.visibility, sibling_penalty=0),
        pad_id=0,
    )


def step_flops(model: PreTrainedModel, batch: Batch, visibility: Visibility) -> float:
    """What a step must compute: multiplications and additions of matrices, nothing twice.

    A weight costs 2 a token forward, 2 for the gradient of its input, and 2 for its own where it is trained.
    The head sees targets only. A visible pair costs 2 a head dimension for its score and 2 for its value, and
    twice that backward.
    """
    config, body = model.config, decoder(model)
    weights = [module.weight for module in body.modules() if isinstance(module, nn.Linear)]
    per_token = sum(weight.numel() * (6 if weight.requires_grad else 4) for weight in weights)
    head = config.vocab_size * config.hidden_size
    placed = to_tensors(batch)
    seen = visible(placed.pos2d[:1, :, 1], placed.sequence[:1], visibility)  # every row is laid out alike
    pairs = len(batch.ids) * int(seen.sum())
    attention = 12 * pairs * config.num_hidden_layers * config.hidden_size
    return batch.tokens * per_token + batch.targets * 4 * head + attention


def measure(model: nn.Module, work: Work) -> Speed:
    """Of the largest batch that fits, after a step to warm up. Raises UserError where not even one sample
    does.
    """
    inner = causal_lm(model)
    loss = TargetLoss(model, work.visibility, torch.bfloat16)
    optimizer = make_optimizer(loss, OptimizerConfig())

    def step(batch: Batch) -> float:
        return optimizer_step(loss, optimizer, accumulate_gradients(loss, iter([batch]), 1).targets, clip=1.0)

    batch = _fitting(step, work, inner.config.vocab_size)
    spent = seconds(lambda: [step(batch) for _ in range(_STEPS)]) / _STEPS
    return Speed(batch.tokens / spent, step_flops(inner, batch, work.visibility) / spent)


def _fitting(step: Callable[[Batch], float], work: Work, vocabulary: int) -> Batch:
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


@lru_cache(maxsize=1)
def _model(shape: str) -> nn.Module:
    return build(SHAPES[shape], "cuda")


@cache
def _speed(shape: str, work: str) -> Speed:
    return measure(_model(shape), WORKS[work])


def peak(device: str) -> float | None:
    """FLOP/s of a GPU by its name; None for one that is not in the table."""
    return next((_PEAKS[word] for word in re.split(r"[\s-]+", device) if word in _PEAKS), None)


def benches(device: str) -> list[Bench]:
    """Two figures for each model and workload; one where the GPU's peak is not known."""
    found, most = [], peak(device)
    for shape in SHAPES:
        for work in WORKS:
            name = f"training.gpu_{shape}{work}"
            found.append(
                Bench(f"{name}_tokens_per_s", None, "higher", "tokens/s", partial(_tokens, shape, work))
            )
            if most is not None:
                found.append(
                    Bench(f"{name}_mfu", None, "higher", "share", partial(_share, shape, work, most))
                )
    return found


def _tokens(shape: str, work: str) -> float:
    return _speed(shape, work).tokens


def _share(shape: str, work: str, most: float) -> float:
    return _speed(shape, work).flops / most


def main() -> None:
    if not torch.cuda.is_available():
        print(
            "no GPU here: torch finds no CUDA device; run make bench-gpu on a machine that has one",
            file=sys.stderr,
        )
        sys.exit(2)
    device = torch.cuda.get_device_name()
    every = [*benches(device), *gpu_decoding.benches(SHAPES["05b"].config)]
    rows = harness.run(every, "", "make bench-gpu")
    rows = [replace(row, machine=f"{device}, {row.machine}") for row in rows]
    harness.record(rows)
    harness.show(rows)


if __name__ == "__main__":
    main()
