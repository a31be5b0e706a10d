"""Estimate from a survey's sample how many batches an epoch has, and what the length limits remove."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import TYPE_CHECKING

from parallelmind.config import DataConfig
from parallelmind.data.packing import EpochSeed, TokenRecord, sample_batches
from parallelmind.data.survey import Survey
from parallelmind.data.tokenise import tokenise_stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENOUGH_BATCHES = 64  # with this many batches, the incomplete last one no longer distorts the estimate


@dataclass(frozen=True, slots=True)
class EpochEstimate:
    """The first epoch, the same for the same data.

    batches: for the learning rate schedule. truncated: number of truncated segments. skipped: number of
    skipped branches and reduces. exact: the sample holds every record, so the numbers are exact.
    """

    batches: int
    truncated: int
    skipped: int
    exact: bool


def estimate_epoch(
    survey: Survey, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int
) -> EpochEstimate:
    """Tokenise and batch the sample like the data itself.

    The numbers depend on the language, the limits and the padding.
    """
    tokenised = list(tokenise_stream(iter(survey.sample), tokenizer, data))
    records = [record for item in tokenised for record in item.for_packing()]
    repeats, scale = 1, survey.records / max(len(survey.sample), 1)
    while (count := _count(records, repeats, data, seed)) < _ENOUGH_BATCHES and 2 * repeats <= scale:
        repeats *= 2
    return EpochEstimate(
        batches=max(1, math.ceil(count / repeats * scale)),
        truncated=round(sum(item.truncated for item in tokenised) * scale),
        skipped=round(sum(item.skipped for item in tokenised) * scale),
        exact=len(survey.sample) == survey.records,
    )


def _count(records: Sequence[TokenRecord], repeats: int, data: DataConfig, seed: int) -> int:
    """Number of batches. The records are repeated: one large batch may hold more than all of them."""
    repeated = chain.from_iterable(repeat(records, repeats))
    return sum(1 for _ in sample_batches(repeated, data, EpochSeed(seed)))
