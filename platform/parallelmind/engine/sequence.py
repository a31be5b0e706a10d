"""One sample on its way through decoding: who has said what, and what is fed when. NumPy only.

Exactness decides the plan: what a cached step computes must equal one full forward over the final tokens.

Free order (`layout.is_free_order`): nothing depends on how far siblings are, so prompts are read as fast as
the step has room, and every step feeds the newest token of each live branch.

Otherwise tokens go in by *columns of time*. The prompt is read up to the column in which the first branch
says its first word; then each step feeds one column, and in it whatever every branch has there: a later part
of a longer prompt, which may see (or be counted after) what a shorter sibling has just said; its newest
token; or the last one of a branch that has ended, which siblings that go on may still see. A branch that
joins late begins in the next column, because what earlier columns have seen can not be changed any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallelmind.config import RopeConfig
from parallelmind.engine.output import FinishReason
from parallelmind.layout import (
    MAIN,
    Ints,
    Layout,
    Tokens,
    arrange,
    branch_coordinates,
    is_free_order,
    start_times,
)


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """What one forward pass reads of a sample. The first five are `[tokens]`, in physical order.

    sequence: 0 for main, 1..N for the branches. branch, time: the pos2d coordinates. position: what drives
    the pairs that pos2d does not. rows, sampled: `[sampled]` indices into the feed whose logits are wanted,
    and the branch (0..N-1) that each of them continues.
    """

    ids: Ints
    sequence: Ints
    branch: Ints
    time: Ints
    position: Ints
    rows: Ints
    sampled: Ints


class SequenceState:
    """The branches of one sample while they grow: `feed`, compute, and `accept` in turn until `done`."""

    def __init__(self, tokens: Tokens, config: RopeConfig) -> None:
        self.config, self.free = config, is_free_order(config)
        self.main = tokens.ids[: tokens.lengths[MAIN]]
        self.starts = start_times(tokens.lengths, config.align_to)[1:]
        self.lengths, self.prompt_lengths = tokens.lengths[1:].copy(), tokens.lengths[1:].copy()
        self.known = tokens.lengths[
            1:
        ].copy()  # to be read before the branch talks: its prompt, and what it said elsewhere
        self.fed = np.zeros_like(self.lengths)
        self.live = np.ones(len(self.lengths), dtype=bool)
        self.reads_all = np.zeros(
            len(self.lengths), dtype=bool
        )  # by the columnar rule, whatever the others do
        self.finish_reasons: list[FinishReason | None] = [None] * len(self.lengths)
        self._ids = np.zeros((len(self.lengths), 2 * int(self.lengths.max())), dtype=np.int64)
        self._ids[np.arange(self._ids.shape[1]) < self.lengths[:, None]] = tokens.ids[len(self.main) :]
        self.main_fed = self._column = (
            0  # tokens of main; the next column to feed, where tokens go in by columns
        )

    @property
    def done(self) -> bool:
        return not self.live.any()

    @property
    def waiting(self) -> int:
        """Tokens that are still to be read before their branches talk."""
        return len(self.main) - self.main_fed + int(np.maximum(self.known - self.fed, 0)[self.live].sum())

    @property
    def prompts_fed(self) -> int:
        """How many of them have been read, those of ended branches included."""
        return self.main_fed + int(np.minimum(self.fed, self.known).sum())

    def skip_main(self, tokens: int) -> None:
        """The beginning of main is in the cache already."""
        self.main_fed = self._column = tokens

    def has_said(self, branch: int, ids: Sequence[int]) -> None:
        """Before anything is fed: a branch has said this elsewhere."""
        for token in ids:
            self.accept(np.array([branch]), np.array([token]))
        self.known[branch] = self.lengths[branch]

    def join(self, ids: Sequence[int], reads_all: bool = False) -> int:
        """Add a branch; returns its number. It begins where alignment puts it, in the next column, or after
        what it reads.
        """
        start = int((self.starts + self.lengths).max()) if reads_all else self.start_of(len(ids))
        number, size = len(self.lengths), max(len(ids) - self._ids.shape[1], 0)
        self._ids = np.pad(self._ids, ((0, 1), (0, size)))
        self._ids[number, : len(ids)] = ids
        self.starts, self.lengths = np.append(self.starts, start), np.append(self.lengths, len(ids))
        self.prompt_lengths, self.known = (
            np.append(self.prompt_lengths, len(ids)),
            np.append(self.known, len(ids)),
        )
        self.fed = np.append(self.fed, 0)
        self.live, self.reads_all = np.append(self.live, True), np.append(self.reads_all, reads_all)
        self.finish_reasons.append(None)
        return number

    def start_of(self, length: int) -> int:
        """The time at which a branch of so many tokens begins, if it joins now."""
        if not self.free:
            return max(len(self.main), self._column)
        right = self.config.align_to == "right"
        return len(self.main) + max(int(self.prompt_lengths.max()) - length if right else 0, 0)

    def feed(self, room: int) -> ScheduledTokens:
        """What to read next, at most `room` tokens of a prompt; call it while not `done`.

        Newest tokens of branches that are already talking go in, however many they are.
        """
        begin, count = self.fed, self._free_counts(room) if self.free else self._column_counts(room)
        main = np.arange(self.main_fed, self.main_fed + self._main_counts(room))
        branches = np.repeat(np.arange(len(count)), count)
        index = np.arange(len(branches)) + np.repeat(begin - np.cumsum(count) + count, count)
        sequence = np.concatenate([np.zeros_like(main), branches + 1])
        time = np.concatenate([main, self.starts[branches] + index])
        ids = np.concatenate([self.main[main], self._ids[branches, index]])
        asks = np.concatenate(
            [np.zeros(len(main), bool), self.live[branches] & (index == self.lengths[branches] - 1)]
        )
        if not self.free:
            order = np.lexsort((sequence, time))
            sequence, time, ids, asks = sequence[order], time[order], ids[order], asks[order]
        flat = self.main_fed + int(self.fed.sum())  # tokens before these
        self.main_fed += len(main)
        self.fed = begin + count
        rows = np.flatnonzero(asks)
        return ScheduledTokens(
            ids=ids,
            sequence=sequence,
            branch=branch_coordinates(sequence, len(self.main) > 0, self.config.branch_stride),
            time=time,
            position=time if self.config.positions == "time" else flat + np.arange(len(time)),
            rows=rows,
            sampled=sequence[rows] - 1,
        )

    def _main_counts(self, room: int) -> int:
        left = len(self.main) - self.main_fed
        return min(left, room) if self.free else min(left, max(self._column - self.main_fed, 0))

    def _free_counts(self, room: int) -> Ints:
        """`[branches]` tokens of each branch to feed, where the order is free: newest ones, and prompts one
        after another.
        """
        left = self.lengths - self.fed
        # Nobody will read the end of a branch that has ended, unless somebody reads them all.
        left[~self.live & ~(self.reads_all & self.live).any()] = 0
        room -= len(self.main) - self.main_fed
        prompts = np.where(self.fed < self.known, left, 0)
        before = np.cumsum(prompts) - prompts
        return (
            np.where(prompts > 0, np.clip(room - before, 0, prompts), left)
            if room >= 0
            else np.zeros_like(left)
        )

    def _column_counts(self, room: int) -> Ints:
        """`[branches]` tokens of each branch in the columns to feed; the first column of those not fed moves
        behind them.
        """
        first = self._column
        last = int((self.starts + self.lengths)[self.live].min())  # the first column that lacks a token
        ends = self.starts + self.lengths
        if last > first + 1:
            columns = np.arange(first, last)
            covered = (columns < len(self.main)).astype(np.int64)
            covered += ((columns >= self.starts[:, None]) & (columns < ends[:, None])).sum(axis=0)
            last = first + max(1, int(np.searchsorted(np.cumsum(covered), room, side="right")))
        self._column = last
        return np.clip(np.minimum(ends, last) - self.starts - self.fed, 0, None)

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

    def history(self, branch: int) -> Ints:
        """`[tokens]` own ids of one branch, prompt first."""
        return self._ids[branch, : self.lengths[branch]]

    def final_layout(self) -> Layout:
        """Main and every branch as they stand now, placed as one sequence: branches stay where they have
        begun.
        """
        branches = [row[:length].tolist() for row, length in zip(self._ids, self.lengths, strict=True)]
        begun = self.config.model_copy(update={"align_to": "left"})
        return arrange(Tokens.of(self.main.tolist(), branches), begun, delays=self.starts - len(self.main))
