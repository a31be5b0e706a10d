"""One sample on its way through decoding: who has said what, and what is fed when. NumPy only.

Exactness decides the plan: what a cached step computes must equal one full forward over the final tokens.

Free order (`layout.is_free_order`): nothing depends on how far siblings are, so the whole prompt is read at once and every
step feeds the newest token of each live branch.

Otherwise tokens go in by *columns of time*. The prompt is read up to the column in which the first branch says its first
word; then each step feeds one column, and in it whatever every branch has there: a later part of a longer prompt, which
may see (or be counted after) what a shorter sibling has just said; its newest token; or the last one of a branch that has
ended, which siblings that go on may still see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from parallelmind.config import RopeConfig
from parallelmind.layout import MAIN, Ints, Layout, Tokens, arrange, branch_coordinates, is_free_order, start_times

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Feed:
    """What one forward pass reads. The first five are `[tokens]`, in physical order.

    sequence: 0 for main, 1..N for the branches. branch, time: the pos2d coordinates. position: what drives the pairs that
    pos2d does not. rows, sampled: `[sampled]` indices into the feed whose logits are wanted, and the branch (0..N-1) that
    each of them continues.
    """

    ids: Ints
    sequence: Ints
    branch: Ints
    time: Ints
    position: Ints
    rows: Ints
    sampled: Ints


class Decoding:
    """The branches of one sample while they grow: feed `prefill()`, then `accept` and `step()` in turn until `done`."""

    def __init__(self, tokens: Tokens, config: RopeConfig) -> None:
        self._tokens, self._config = tokens, config
        self._free = is_free_order(config)
        self._starts = start_times(tokens.lengths, config.align_to)[1:]
        self._ids = np.zeros((tokens.branches, 2 * int(tokens.lengths[1:].max())), dtype=np.int64)
        prompt = np.arange(self._ids.shape[1]) < tokens.lengths[1:, None]
        self._ids[prompt] = tokens.ids[tokens.lengths[MAIN] :]
        self.prompt_lengths = tokens.lengths[1:].copy()
        self.lengths = tokens.lengths[1:].copy()
        self.live = np.ones(tokens.branches, dtype=bool)
        self.finish_reasons: list[FinishReason | None] = [None] * tokens.branches
        self._column = int((self._starts + self.lengths).min())  # time of the first token to be decoded
        self._cached = 0

    @property
    def done(self) -> bool:
        return not self.live.any()

    def prefill(self) -> Feed:
        """All of the prompt that no decoded token can come before."""
        layout = arrange(self._tokens, self._config)
        count = len(layout.ids) if self._free else int(np.searchsorted(layout.time, self._column))
        sequence, time = layout.sequence[:count], layout.time[:count]
        branch = np.maximum(sequence - 1, 0)
        last = (sequence != MAIN) & (time == (self._starts + self.lengths - 1)[branch])
        rows = np.flatnonzero(last)
        self._cached = count
        return Feed(layout.ids[:count], sequence, layout.branch[:count], time, layout.position[:count], rows, sequence[rows] - 1)

    def step(self) -> Feed:
        """The next token of every branch that has one; call it while not `done`."""
        index = self.lengths - 1 if self._free else self._column - self._starts
        fed = np.flatnonzero(self.live if self._free else index < self.lengths)
        index = index[fed]
        rows = np.flatnonzero((index == self.lengths[fed] - 1) & self.live[fed])
        sequence, time = fed + 1, self._starts[fed] + index
        flat = self._config.positions == "flat"
        feed = Feed(
            ids=self._ids[fed, index],
            sequence=sequence,
            branch=branch_coordinates(sequence, bool(self._tokens.lengths[MAIN]), self._config.branch_stride),
            time=time,
            position=np.arange(self._cached, self._cached + len(fed)) if flat else time,
            rows=rows,
            sampled=fed[rows],
        )
        self._column += 1
        self._cached += len(fed)
        return feed

    def accept(self, branches: Ints, ids: Ints) -> None:
        """Append one decoded token to each of these branches."""
        if self.lengths.max() == self._ids.shape[1]:
            self._ids = np.pad(self._ids, ((0, 0), (0, self._ids.shape[1])))
        self._ids[branches, self.lengths[branches]] = ids
        self.lengths[branches] += 1

    def finish(self, branch: int, reason: FinishReason) -> None:
        self.live[branch] = False
        self.finish_reasons[branch] = reason

    def generated(self, branch: int) -> Ints:
        """`[decoded so far]` ids of one branch."""
        return self._ids[branch, self.prompt_lengths[branch] : self.lengths[branch]]

    def history(self, branches: Ints) -> Ints:
        """`[branches, longest]` own ids of each branch, prompt first; short rows are filled up with their own first id."""
        longest = int(self.lengths[branches].max())
        ids = self._ids[branches, :longest]
        return np.where(np.arange(longest) < self.lengths[branches, None], ids, ids[:, :1])

    def final_layout(self) -> Layout:
        """Main and every branch as they stand now, placed as one sequence: branches stay where they have begun."""
        main = self._tokens.ids[: self._tokens.lengths[MAIN]]
        branches = [row[:length].tolist() for row, length in zip(self._ids, self.lengths, strict=True)]
        begun = self._config.model_copy(update={"align_to": "left"})
        return arrange(Tokens.of(main.tolist(), branches), begun, delays=self._starts - len(main))
