"""Engines that record the logits of every sampled token, and the models and settings of their tests."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.engine.decoding_check import layout_logits
from parallelmind.engine.engine import Engine
from parallelmind.engine.grammar_matcher import TokenMasks
from parallelmind.engine.sampler import PendingTokens, SamplingRow
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.evaluation.probes import check_close
from parallelmind.evaluation.rope_configs import rope_config_grid
from parallelmind.evaluation.tiny_models import VOCABULARY, tiny_tokenizer

END = 2
MODELS = [
    (name, attention)
    for name in ("shared", "windows beside full attention")
    for attention in ("sdpa", "eager")  # attention by segments, or through one dense mask
]
CONFIGS = rope_config_grid(
    visibility=("columnar", "isolated"), positions=("time", "flat"), align_to=("left", "right")
)


class RecordingEngine(Engine):
    """Records the logits of every sampled token by its seed, and chooses tokens regardless of them.

    Tokens chosen by the logits of a tiny model soon repeat, and equal tokens hide a wrong position.
    """

    def __init__(self, model: PreTrainedModel, limits: EngineConfig, **settings: Any) -> None:
        super().__init__(model, tiny_tokenizer(), limits, **settings)
        self.logits: dict[tuple[int, int], list[Tensor]] = defaultdict(list)

    def takes_most_likely(self, rows: Sequence[SamplingRow]) -> bool:
        return False

    def sample(
        self, logits: Tensor, rows: Sequence[SamplingRow], masks: TokenMasks | None = None
    ) -> PendingTokens:
        for row, row_logits in zip(rows, logits, strict=True):
            self.logits[row.seed, row.branch].append(row_logits)
        return PendingTokens.of([token_of(row.seed, row.branch, row.index) for row in rows])


def token_of(*key: int) -> int:
    """A token that depends on these numbers alone; one in twenty ends the text."""
    rng = random.Random(repr(key))
    return END if rng.random() < 0.05 else rng.randrange(END + 1, VOCABULARY)


def prompt(length: int, *key: int) -> list[int]:
    return [random.Random(repr((key, index))).randrange(END + 1, VOCABULARY) for index in range(length)]


@torch.no_grad()
def full_forward_logits(model: PreTrainedModel, group: SequenceGroup) -> list[Tensor]:
    """`[length, vocab]` logits of main and each branch, from one forward pass without a cache."""
    return layout_logits(model, group.final_layout(), group.config)


def run_and_check(engine: RecordingEngine, groups: Sequence[SequenceGroup]) -> None:
    """Decode all samples, whose seeds are their numbers: all logits are those of one full forward pass."""
    while engine.busy:
        engine.step()
    for group in groups:
        expected = full_forward_logits(engine.model, group)
        for branch in group.branches:
            logits = engine.logits[group.id, branch.index]
            assert len(logits) == len(branch.generated)
            if logits:
                own = expected[branch.number][branch.num_prompt - 1 :][: len(logits)]
                check_close(torch.stack(logits), own, f"sample {group.id}, branch {branch.index}")
