"""How many batches an epoch will hold, from the sample that a survey took: a run's learning rate falls over
so many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, repeat

from transformers import PreTrainedTokenizerBase

from parallelmind.config import DataConfig
from parallelmind.data.packing import Row, Seeds, groups
from parallelmind.data.survey import Survey
from parallelmind.data.tokenise import tokenised

_ENOUGH = 64  # batches in which the last one, which is not full, no longer matters


def epoch_batches(found: Survey, tokenizer: PreTrainedTokenizerBase, data: DataConfig, seed: int) -> int:
    """Exact for the first epoch where the sample holds every record, else about so many; the same for the
    same data.

    The sample goes all the way that the data will go: no rule of thumb knows the language, the limits and the
    padding.
    """
    items = tokenised(iter(found.sample), tokenizer, data)
    rows = [Row(item.tokens, record.lone) for record, item in items if item.tokens is not None]
    times, as_large = 1, found.records / max(len(found.sample), 1)
    while (count := _batches(rows, times, data, seed)) < _ENOUGH and 2 * times <= as_large:
        times *= 2
    return max(1, math.ceil(count / times * as_large))


def _batches(rows: Sequence[Row], times: int, data: DataConfig, seed: int) -> int:
    """Of the rows, repeated so many times: a large batch may hold more than all of them."""
    return sum(1 for _ in groups(chain.from_iterable(repeat(rows, times)), data, Seeds(seed)))
