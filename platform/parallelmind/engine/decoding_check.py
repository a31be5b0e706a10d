"""Compare the logits of cached decoding with those of one forward pass over the same tokens.

Both run the same model. They differ by rounding alone as long as the caches, masks and coordinates of
decoding are those that the model was trained with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.grammar_matcher import TokenMasks
from parallelmind.engine.model_runner import Model
from parallelmind.engine.request import Sample, Segment
from parallelmind.engine.sampler import PendingTokens, SamplingRow
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.layout import Layout, collate
from parallelmind.model.inputs import decoder_inputs, to_tensors
from parallelmind.model.structure import causal_lm

# Token ids of the checked sample. Every vocabulary has them, and their text does not matter.
CHECK_MAIN = [5, 6, 7, 8, 9, 10, 11, 12]
CHECK_BRANCHES = [[20, 21, 22, 23], [30, 31, 32, 33, 34, 35], [40, 41]]
CHECK_SAMPLE = Sample(CHECK_MAIN, CHECK_BRANCHES)
# Three levels of branches, two reduces, and a branch that is only read.
CHECK_TREE = Sample(
    CHECK_MAIN,
    [
        Segment([20, 21], [[22, 23, 24], Segment([25], [[26, 27]])], reduce=[28, 29]),
        Segment([30, 31, 32, 33], sampling={"max_new_tokens": 0}),
    ],
    reduce=Segment([34, 35], [[36]]),
)
_FIRST_NEW_TOKEN, _TOKENS_PER_BRANCH = 60, 5
_MAX_NEW_TOKENS = 4  # of the first branch; each further one of main ends one token earlier
_CACHE_TOKENS = 512


class LogitRecorder(Engine):
    """Decode one sample with fixed next tokens and record the logits of every step.

    All tokens differ: equal tokens would give equal scores, which hide a mistaken position. `logits` holds
    `[vocab]` tensors in decoding order, one list for each segment after main.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: PreTrainedTokenizerBase,
        sample: Sample = CHECK_SAMPLE,
    ) -> None:
        super().__init__(model, tokenizer, EngineConfig(cache_tokens=_CACHE_TOKENS))
        lengths = [{"max_new_tokens": _MAX_NEW_TOKENS - branch} for branch in range(len(sample.branches))]
        number = self.submit(sample, per_branch=lengths, ignore_eos=True, max_new_tokens=_MAX_NEW_TOKENS)
        self.group = self.samples.groups[number]
        self.logits: list[list[Tensor]] = [[] for _ in self.group.branches]

    def takes_most_likely(self, rows: Sequence[SamplingRow]) -> bool:
        return False

    def sample(
        self, logits: Tensor, rows: Sequence[SamplingRow], masks: TokenMasks | None = None
    ) -> PendingTokens:
        for row, row_logits in zip(rows, logits, strict=True):
            self.logits[row.branch].append(row_logits)
        return PendingTokens.of(
            [_FIRST_NEW_TOKEN + _TOKENS_PER_BRANCH * row.branch + row.index + 1 for row in rows]
        )

    def run(self) -> None:
        """Step until every branch has ended."""
        while self.busy:
            self.step()


@torch.no_grad()
def layout_logits(model: Model, layout: Layout, config: RopeConfig) -> list[Tensor]:
    """Logits of a whole sample from one forward pass.

    Returns one `[length, vocab]` tensor for every segment, main first.
    """
    inputs = to_tensors(collate([layout], pad_id=0), model.device)
    logits = model(**decoder_inputs(causal_lm(model), inputs, config.visibility)).logits[0]
    return [logits[inputs.segment[0] == number] for number in range(layout.tree.segments)]


def relative_distance(logits: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest expected logit."""
    return ((logits.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def decoding_distance(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    config: RopeConfig,
    sample: Sample = CHECK_SAMPLE,
) -> float:
    """Largest `relative_distance` of a segment between cached decoding and one forward pass.

    The model must be patched with `config`.
    """
    engine = LogitRecorder(model, tokenizer, sample)
    engine.run()
    expected = layout_logits(model, engine.group.final_layout(), config)[1:]
    distances = [
        relative_distance(torch.stack(decoded), whole[branch.num_prompt - 1 : -1])
        for decoded, whole, branch in zip(engine.logits, expected, engine.group.branches, strict=True)
        if decoded
    ]
    return float(torch.tensor(distances).max())  # NaN if any distance is
