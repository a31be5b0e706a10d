"""Held-out text to measure a model on: the same branches, target by target, however many of them share a
sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from parallelmind.config import DataConfig
from parallelmind.data.files import file_parts
from parallelmind.data.packing import Row, Seeds, batch, regrouped
from parallelmind.data.survey import records
from parallelmind.data.tokenise import Tokenised, tokenised
from parallelmind.layout import Tokens


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The first `pool` branches of some files, as far as they go. truncated: texts that were cut. skipped:
    branches left out.
    """

    rows: list[Row]
    pool: int
    data: DataConfig
    truncated: int
    skipped: int

    @staticmethod
    def read(
        files: Sequence[str], pool: int, tokenizer: PreTrainedTokenizerBase, data: DataConfig
    ) -> HeldOut:
        """Bad lines are left out: a survey tells of them."""
        items = list(_first_items(files, pool, tokenizer, data))
        rows = [Row(item.tokens, lone) for item, lone in items if item.tokens is not None]
        return HeldOut(
            rows, pool, data, sum(item.truncated for item, _ in items), sum(item.skipped for item, _ in items)
        )

    @property
    def branches(self) -> int:
        """How many there are: `pool`, or fewer where the files end before."""
        return min(sum(row.tokens.branches for row in self.rows), self.pool)

    def batches(self, branches: int, seed: int) -> list[list[Tokens]]:
        """The samples of every batch, with up to `branches` branches each. Branches of one record stay with
        their main.
        """
        return list(
            batch(regrouped(self.rows, branches, self.pool, self.data), self.data, Seeds(seed).generator())
        )


def _first_items(
    files: Sequence[str], pool: int, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> Iterator[tuple[Tokenised, bool]]:
    """Every good record until `pool` branches are there, and whether it is a lone one."""
    for part in file_parts(files):
        for record, item in tokenised(records(part, data, len(tokenizer)), tokenizer, data):
            if pool <= 0:
                return
            yield item, record.lone
            pool -= item.tokens.branches if item.tokens is not None else 0
