"""Estimate the number of batches in an epoch from a survey's sample, for the learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING

from parallelmind.config import DataConfig
from parallelmind.data.packing import EpochSeed, TokenRecord, sample_batches
from parallelmind.data.survey import Survey
from parallelmind.data.tokenise import tokenise_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENOUGH_BATCHES = 64  # with this many batches, the incomplete last one no longer distorts the estimate


def estimate_batch_count(
    survey: Survey, tokenizer: PreTrainedTokenizerBase, config: DataConfig, seed: int
) -> int:
    """Number of batches in the first epoch, the same for the same data.

    It is exact if the sample holds every record, otherwise an estimate. The sample is tokenised and batched
    like the data itself, because the number depends on the language, the limits and the padding.
    """
    tokenised = tokenise_stream(iter(survey.sample), tokenizer, config)
    records = [record for item in tokenised for record in item.for_packing()]
    repeats, scale = 1, survey.records / max(len(survey.sample), 1)
    while (count := _count(records, repeats, config, seed)) < _ENOUGH_BATCHES and 2 * repeats <= scale:
        repeats *= 2
    return max(1, math.ceil(count / repeats * scale))


def _count(records: Sequence[TokenRecord], repeats: int, config: DataConfig, seed: int) -> int:
    """Number of batches. The records are repeated: one large batch may hold more than all of them."""
    repeated = chain.from_iterable(repeat(records, repeats))
    return sum(1 for _ in sample_batches(repeated, config, EpochSeed(seed)))
