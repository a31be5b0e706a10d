"""A LoRA step on SmolLM2 over the same tokens: patched and columnar against unpatched and plainly causal."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness import Bench, ratio
from benchmarks.text import passages
from parallelmind.config import BaseConfig, LoraConfig, OptimizerConfig, RopeConfig
from parallelmind.data.grouping import make_batch
from parallelmind.layout import IGNORE, Batch, Tokens
from parallelmind.model.adapter import add_lora
from parallelmind.model.base import load_base
from parallelmind.model.patch import patch
from parallelmind.training.loss import TargetLoss
from parallelmind.training.step import backward, make_optimizer, update

_SAMPLES, _LONGEST = 2, 512


def _batch() -> Batch:
    samples = [(main[: _LONGEST // 2], [branch[:32] for branch in branches]) for main, branches in passages(_SAMPLES)]
    return make_batch([Tokens.of(main, branches) for main, branches in samples], RopeConfig(), pad_id=0)


def _step(patched: bool, batch: Batch) -> Callable[[], float]:
    model, _ = load_base(BaseConfig())
    if patched:
        patch(model, RopeConfig())
    lora = add_lora(model, LoraConfig(), seed=0)
    lora.train()
    optimizer = make_optimizer(lora, OptimizerConfig())
    learner = TargetLoss(lora, RopeConfig().visibility)

    def patched_step() -> float:
        totals = backward(learner, iter([batch]), 1)
        return update(learner, optimizer, totals.targets, clip=1.0)

    ids = torch.from_numpy(batch.ids)
    wanted = torch.from_numpy(batch.labels) != IGNORE
    labels = torch.from_numpy(batch.labels)[wanted]

    def plain_step() -> float:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[wanted]
        logits = model.get_output_embeddings()(hidden).float()
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        return update(learner, optimizer, len(labels), clip=1.0)

    return patched_step if patched else plain_step


def step_overhead() -> float:
    """Time of the patched step over time of the plain one: same weights, tokens, targets and optimizer."""
    batch = _batch()
    return ratio(_step(True, batch), _step(False, batch), repeats=5)


BENCHES = [Bench("training.step_vs_plain", 1.10, "lower", "ratio", step_overhead)]
