"""What the laws are made of: logits of a whole sample, of a lone text and of every decoding step, and how far
apart they are.

The laws are exact in exact arithmetic; what is allowed for is the rounding of float32. A check that looks for
a difference needs weights wide enough for one token to matter, as `evaluation.tiny` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.engine.sampler import SampledToken, SamplingRow
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.evaluation.tiny_models import tiny_tokenizer
from parallelmind.layout import Layout, Tokens, arrange
from parallelmind.model.mask import attention_masks
from parallelmind.model.patch import patch, unpatch

MAIN = [5, 6, 7, 8, 9, 10, 11, 12]
BRANCHES = [[20, 21, 22, 23], [30, 31, 32, 33, 34, 35], [40, 41]]
CLOSE = 5e-4  # what float32 rounding may do, as a share of the largest logit
LEAK = 1e-2  # what a visible token does at least
_MOST = 4  # new tokens of the branch that talks longest

Branches = list[list[int]]


class LawViolationError(Exception):
    """A check failed; the message says by how much."""


@contextmanager
def patched(model: PreTrainedModel, config: RopeConfig) -> Iterator[RopeConfig]:
    patch(model, config)
    try:
        yield config
    finally:
        unpatch(model)


@torch.no_grad()
def layout_logits(
    model: PreTrainedModel | PeftModel,
    layout: Layout,
    config: RopeConfig,
    shift: int = 0,
    move: int = 0,
    by: int = 0,
) -> list[Tensor]:
    """`[length, vocab]` logits of main and of every branch, from one forward pass over a whole sample.

    shift: added to every branch coordinate. move, by: a branch whose coordinate is changed, and by how much.
    """
    device = model.device
    ids, sequence, branch, time, position = (
        torch.from_numpy(part)[None].to(device)
        for part in (layout.ids, layout.sequence, layout.branch, layout.time, layout.position)
    )
    branch = branch + shift + (sequence == move) * by
    out = model(
        input_ids=ids,
        attention_mask=attention_masks(model, time, sequence, config.visibility),
        position_ids=position,
        pos2d=torch.stack([branch, time], dim=-1),
        use_cache=False,
    ).logits[0]
    return [out[sequence[0] == number] for number in range(int(sequence.max()) + 1)]


def sample_logits(
    model: PreTrainedModel | PeftModel, config: RopeConfig, branches: Branches = BRANCHES, **changes: Any
) -> list[Tensor]:
    """`layout_logits` of main and these branches."""
    return layout_logits(model, arrange(Tokens.of(MAIN, branches), config), config, **changes)


@torch.no_grad()
def plain_logits(model: PreTrainedModel, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]


class Recorder(Engine):
    """Keeps the logits of every token that was drawn, by branch, and says a new token each time; branches end
    one by one.

    Equal tokens would be ties for an attention that keeps the best few, and hide a mistaken place for any
    other.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, main: list[int]) -> None:
        super().__init__(model, tiny_tokenizer(), EngineConfig(cache_tokens=512))
        self.seen: list[list[Tensor]] = [[] for _ in BRANCHES]
        lengths = [{"max_new_tokens": _MOST - branch} for branch in range(len(BRANCHES))]
        number = self.submit(Sample(main, BRANCHES), per_branch=lengths, ignore_eos=True)
        self.state = self._samples[number].entry.decoding

    def choose(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        for row, found in zip(rows, logits, strict=True):
            self.seen[row.branch].append(found)
        return [SampledToken(60 + 10 * row.branch + row.index + 1, None) for row in rows]

    def run(self) -> None:
        while self.busy:
            self.step()


def check_close(found: Tensor, expected: Tensor, what: str, share: float = CLOSE) -> None:
    if found.numel() and not (distance := _distance(found, expected)) <= share:
        raise LawViolationError(f"{what} differ by {distance:.2g} of the largest logit")


def check_differ(found: Tensor, expected: Tensor, what: str) -> None:
    if not (distance := _distance(found, expected)) > LEAK:
        raise LawViolationError(f"{what}: logits move by {distance:.2g} of the largest only")


def _distance(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
