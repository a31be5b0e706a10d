"""A training step on SmolLM2 and samples for it, as several benchmarks use them."""

from __future__ import annotations

from transformers import PreTrainedModel

from benchmarks.text import passages
from parallelmind.config import LoraConfig, ModelConfig, OptimizerConfig, RopeConfig
from parallelmind.layout import Batch, Tokens
from parallelmind.model.adapter import add_lora
from parallelmind.model.base_model import load_base
from parallelmind.model.patch import patch
from parallelmind.training.loss import TargetLoss
from parallelmind.training.step import accumulate_gradients, make_optimizer, optimizer_step

_MAIN = 512


class Learner:
    """A base model, by default SmolLM2, with a fresh LoRA adapter and an optimizer."""

    def __init__(self, rope: RopeConfig, base: PreTrainedModel | None = None) -> None:
        self.base = load_base(ModelConfig())[0] if base is None else base
        if rope.patch_rope:
            patch(self.base, rope)
        self.model = add_lora(self.base, LoraConfig(), seed=0)
        self.loss = TargetLoss(self.model, rope.visibility).train()
        self.optimizer = make_optimizer(self.model, OptimizerConfig())

    def step(self, *batches: Batch) -> float:
        """Take one optimizer step on the batches and return the gradient norm."""
        totals, _ = accumulate_gradients(self.loss, iter(batches), len(batches))
        return optimizer_step(self.loss, self.optimizer, totals.targets, clip=1.0).item()


def long_samples(count: int, branch: int) -> list[Tokens]:
    """Return `count` samples of a 512-token main and eight branches of `branch` tokens."""
    ids = [token for main, _ in passages(20 * count) for token in main]
    size = _MAIN + 8 * branch
    samples = []
    for first in range(0, count * size, size):
        tokens = ids[first : first + size]
        samples.append(
            Tokens.of(tokens[:_MAIN], [tokens[at : at + branch] for at in range(_MAIN, size, branch)])
        )
    return samples
