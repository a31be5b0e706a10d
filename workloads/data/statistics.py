"""Lengths and padding of tokenised records and of the batches made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from parallelmind.data.tokenise import TokenisedRecord
from parallelmind.layout import Tokens
from parallelmind.tree import MAIN

PERCENTILES = (50, 90, 99, 100)


@dataclass(slots=True)
class LengthStatistics:
    """Accumulates counts over records and batches.

    main_tokens, branch_tokens, reduce_tokens: one entry per main that is not empty, and per remaining branch
    and reduce at all depths. depth: that of the deepest record. targets: number of tokens with a loss.
    truncated: number of truncated texts. skipped: number of branches and reduces left out. sample_branches:
    one entry per sample. batch_tokens, batch_padded_tokens: one entry per batch, without and with padding.
    """

    main_tokens: list[int] = field(default_factory=list)
    branch_tokens: list[int] = field(default_factory=list)
    reduce_tokens: list[int] = field(default_factory=list)
    depth: int = 0
    targets: int = 0
    truncated: int = 0
    skipped: int = 0
    sample_branches: list[int] = field(default_factory=list)
    batch_tokens: list[int] = field(default_factory=list)
    batch_padded_tokens: list[int] = field(default_factory=list)

    def add_record(self, record: TokenisedRecord) -> None:
        self.truncated += record.truncated
        self.skipped += record.skipped
        if record.tokens is None:
            return
        lengths, tree = record.tokens.lengths, record.tokens.tree
        if lengths[MAIN]:
            self.main_tokens.append(int(lengths[MAIN]))
        self.branch_tokens += lengths[tree.is_branch].tolist()
        self.reduce_tokens += lengths[tree.is_reduce].tolist()
        self.depth = max(self.depth, tree.depth)
        self.targets += int(record.tokens.targets.sum())

    def add_batch(self, samples: Sequence[Tokens], packing: bool = False) -> None:
        """Add the samples of one batch, which are padded to the longest of them; with packing, not at all."""
        lengths = [len(sample.ids) for sample in samples]
        self.sample_branches += [sample.branches for sample in samples]
        self.batch_tokens.append(sum(lengths))
        self.batch_padded_tokens.append(sum(lengths) if packing else len(samples) * max(lengths))

    @property
    def tokens(self) -> int:
        """Tokens of all records; a main counts once, even if several samples repeat it."""
        return sum(map(sum, (self.main_tokens, self.branch_tokens, self.reduce_tokens)))

    @property
    def segments(self) -> int:
        """Mains, branches and reduces of all records."""
        return sum(map(len, (self.main_tokens, self.branch_tokens, self.reduce_tokens)))

    @property
    def padding(self) -> float:
        """Share of padding in all batches."""
        return 1 - sum(self.batch_tokens) / max(sum(self.batch_padded_tokens), 1)


def percentiles(values: Sequence[int]) -> list[int]:
    """The smallest value that at least 50, 90, 99 and 100 percent of the values do not exceed.

    values: at least one.
    """
    return [int(value) for value in np.percentile(values, PERCENTILES, method="inverted_cdf")]
