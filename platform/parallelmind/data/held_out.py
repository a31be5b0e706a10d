"""Held-out text to evaluate on: the same target tokens, however many branches share a sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parallelmind.config import DataConfig
from parallelmind.data.files import file_parts
from parallelmind.data.packing import EpochSeed, TokenRecord, batch, pack, split
from parallelmind.data.tokenise import TokenisedRecord, tokenise_part
from parallelmind.layout import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The records that hold the first `pool` branches of some files, or all if there are fewer.

    truncated: number of truncated segments. skipped: number of branches and reduces skipped by the length
    limits.
    """

    records: list[TokenRecord]
    pool: int
    data: DataConfig
    truncated: int
    skipped: int

    @staticmethod
    def read(
        files: Sequence[str], pool: int, tokenizer: PreTrainedTokenizerBase, data: DataConfig
    ) -> HeldOut:
        """Read and tokenise the files. Bad lines are skipped; the survey reports them."""
        tokenised = list(_first_records(files, pool, tokenizer, data))
        return HeldOut(
            [record for item in tokenised for record in item.for_packing()],
            pool,
            data,
            sum(item.truncated for item in tokenised),
            sum(item.skipped for item in tokenised),
        )

    @property
    def branches(self) -> int:
        """Number of branches: `pool`, fewer if the files hold fewer, or more if a reduce reads more."""
        return sum(record.tokens.branches for record in _first_branches(self.records, self.pool))

    @property
    def highest_id(self) -> int:
        """The highest token id, 0 without records."""
        return max((int(record.tokens.ids.max()) for record in self.records), default=0)

    def batches(self, branches: int, seed: int) -> list[list[Tokens]]:
        """The samples of every batch, with up to `branches` branches each."""
        samples = regroup_branches(self.records, branches, self.pool, self.data)
        return list(batch(samples, self.data, EpochSeed(seed).generator()))


def _first_records(
    files: Sequence[str], pool: int, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> Iterator[TokenisedRecord]:
    """Tokenised records until they hold `pool` branches."""
    for part in file_parts(files):
        for record in tokenise_part(part, tokenizer, data):
            if pool <= 0:
                return
            yield record
            pool -= record.tokens.branches if record.tokens is not None else 0


def regroup_branches(
    records: Iterable[TokenRecord], branches: int, pool: int, data: DataConfig
) -> list[Tokens]:
    """The first `pool` branches as samples of `branches` each: the same text for every value of `branches`.

    Branches of one record stay with their main, so its last sample may hold fewer. A sample holds more if a
    reduce reads more.
    """
    fixed = data.model_copy(update={"branches_per_sample": branches, "max_branches_per_sample": branches})
    return list(pack(_first_branches(records, pool), fixed, np.random.default_rng(0)))


def _first_branches(records: Iterable[TokenRecord], pool: int) -> Iterator[TokenRecord]:
    for record in records:
        if pool <= 0:
            return
        if record.tokens.branches <= pool:
            yield record
        else:
            yield TokenRecord(next(split(record.tokens, pool, len(record.tokens.ids))), record.standalone)
        pool -= record.tokens.branches
