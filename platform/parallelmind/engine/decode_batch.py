"""The samples that only decode, as arrays that stay from step to step. NumPy only.

Most steps compute nothing but the newest token of every branch. What a sample contributes to such a step is
kept until the sample changes; what does change in every step is in the block tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

from parallelmind.engine.attention_spans import AttentionSpans, free_order_spans, side_by_side
from parallelmind.engine.block_manager import BLOCK, blocks_for
from parallelmind.engine.block_table import BlockTables
from parallelmind.engine.branch_row import BranchRow
from parallelmind.engine.sequence import BranchState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.tree import Ints


@dataclass(frozen=True, slots=True, eq=False)
class DecodingSample:
    """A sample that only decodes, as it is at one version.

    branches: those that run, in the order of their numbers.
    tables: `[branches]` rows of their block tables. number, coordinate, start_time: `[branches]`.
    spans: what the branches attend to, counted from the first of them.
    missing_blocks: those of the sample that its block tables do not tell, which may be fewer than none.
    """

    group: SequenceGroup
    version: int
    branches: list[BranchState]
    rows: list[BranchRow]
    tables: Ints
    number: Ints
    coordinate: Ints
    start_time: Ints
    spans: AttentionSpans
    missing_blocks: int

    @staticmethod
    def of(group: SequenceGroup) -> DecodingSample:
        branches = group.running_branches
        number = np.array([branch.number for branch in branches])
        growing = sum(blocks_for(branch.num_tokens + 1) - len(branch.table.blocks) for branch in branches)
        return DecodingSample(
            group=group,
            version=group.version,
            branches=branches,
            rows=[BranchRow(group, branch) for branch in branches],
            tables=np.array([branch.table.row for branch in branches]),
            number=number,
            coordinate=group.shape.coordinates[number],
            start_time=group.start_times[number],
            spans=free_order_spans(group, number.tolist()),
            missing_blocks=group.missing_blocks - growing,
        )


@dataclass(frozen=True, slots=True, eq=False)
class DecodeBatch:
    """The branches of all samples that only decode, side by side. Arrays are `[branches]`."""

    samples: list[DecodingSample]
    branches: list[BranchState]
    rows: list[BranchRow]
    groups: list[SequenceGroup]
    tables: Ints
    number: Ints
    coordinate: Ints
    start_time: Ints
    spans: AttentionSpans

    @staticmethod
    def of(samples: list[DecodingSample]) -> DecodeBatch:
        starts = accumulate((len(sample.branches) for sample in samples[:-1]), initial=0)
        return DecodeBatch(
            samples=samples,
            branches=list(chain.from_iterable(sample.branches for sample in samples)),
            rows=list(chain.from_iterable(sample.rows for sample in samples)),
            groups=[sample.group for sample in samples for _ in sample.branches],
            tables=np.concatenate([sample.tables for sample in samples]),
            number=np.concatenate([sample.number for sample in samples]),
            coordinate=np.concatenate([sample.coordinate for sample in samples]),
            start_time=np.concatenate([sample.start_time for sample in samples]),
            spans=side_by_side([sample.spans for sample in samples], list(starts)),
        )

    def unchanged(self) -> DecodeBatch | None:
        """The batch without samples that have changed; None if no sample is left."""
        samples = [sample for sample in self.samples if sample.version == sample.group.version]
        if len(samples) == len(self.samples):
            return self
        return DecodeBatch.of(samples) if samples else None

    def missing_blocks(self, tables: BlockTables) -> int:
        """Blocks that the samples need for the next token of each branch and the one after it."""
        growing = -(-(tables.length[self.tables] + 2) // BLOCK) - tables.num_blocks[self.tables]
        return int(growing.sum()) + sum(sample.missing_blocks for sample in self.samples)

    def step(self, tables: BlockTables, full: Ints, blocks: Sequence[int]) -> DecodeStep:
        """The next step of all branches. full, blocks: as in `DecodeStep`."""
        slots = tables.next_slot[self.tables]
        slots[full] = BLOCK * np.array(blocks, np.int64)
        ids = np.array([branch.token_ids[-1] for branch in self.branches])
        return DecodeStep(self, ids, self.start_time + tables.length[self.tables], slots, full, blocks)


class DecodeStep(NamedTuple):
    """The newest token of each branch of a batch.

    It may be planned while the step before it runs, from which its ids come then. Until that one is
    committed, such a step is staged for as long as its inputs are laid out.

    ids, time, slots: `[branches]`. full: branches whose token begins a block. blocks: allocated for these.
    """

    batch: DecodeBatch
    ids: Ints
    time: Ints
    slots: Ints
    full: Ints
    blocks: Sequence[int]

    def stage(self, tables: BlockTables) -> None:
        """Note the tokens in the block tables."""
        rows, length = self.batch.tables, self.time - self.batch.start_time
        if len(self.full):
            tables.append(rows[self.full], np.array(self.blocks), length[self.full] + BLOCK)
        tables.staged[rows] = length + 1
        tables.place(self.slots, self.time, self.batch.number)

    def unstage(self, tables: BlockTables) -> None:
        """Restore the tables of the step that runs."""
        tables.staged[self.batch.tables] -= 1

    def following(
        self, tables: BlockTables, allocate: Callable[[int], list[int] | None]
    ) -> DecodeStep | None:
        """The step after this one, which is staged. Its ids are not known. None if there are no blocks."""
        free = tables.num_free[self.batch.tables] - 1
        free[self.full] += BLOCK
        full, slots = np.flatnonzero(free == 0), self.slots + 1
        blocks = allocate(len(full))
        if blocks is None:
            return None
        slots[full] = BLOCK * np.array(blocks, np.int64)
        return DecodeStep(self.batch, np.zeros_like(self.ids), self.time + 1, slots, full, blocks)

    def rows_of(self, batch: DecodeBatch) -> Ints | None:
        """`[branches]` where the branches of a batch are in this step; None unless it has all of them."""
        if batch is self.batch:
            return np.arange(len(batch.branches))
        row_of = {branch: row for row, branch in enumerate(self.batch.branches)}
        rows = [row_of.get(branch, -1) for branch in batch.branches]
        return None if min(rows) < 0 else np.array(rows)

    def new_blocks(self) -> dict[BranchState, int]:
        """The blocks that are allocated, by branch."""
        full = (self.batch.branches[row] for row in self.full.tolist())
        return dict(zip(full, self.blocks, strict=True))

    def commit(self, tables: BlockTables) -> list[int]:
        """Count the tokens as computed; returns the blocks that the tables hold from now on.

        A branch whose table was cleared during the forward pass is left out.
        """
        rows = self.batch.tables
        is_staged, new_blocks = tables.staged[rows] == tables.length[rows] + 1, np.zeros(len(rows), np.int64)
        new_blocks[self.full] = 1
        tables.commit(rows[is_staged], 1, new_blocks[is_staged])
        for index in np.flatnonzero(is_staged).tolist():
            self.batch.branches[index].num_computed += 1
        held = list[int]()
        for index, block in zip(self.full.tolist(), self.blocks, strict=True):
            if is_staged[index]:
                self.batch.branches[index].table.blocks.append(block)
                held.append(block)
        return held


def missing_blocks(batch: DecodeBatch | None, others: Sequence[SequenceGroup], tables: BlockTables) -> int:
    """Blocks that running samples need for their known tokens and one more of each branch."""
    decoding = batch.missing_blocks(tables) if batch else 0
    return decoding + sum(group.missing_blocks for group in others)


class DecodingSamples:
    """Finds the samples that only decode, and keeps them from step to step."""

    def __init__(self) -> None:
        self._samples: dict[SequenceGroup, DecodingSample] = {}
        self._batch: DecodeBatch | None = None

    def divide(self, groups: Sequence[SequenceGroup]) -> tuple[DecodeBatch | None, list[SequenceGroup]]:
        """The branches of the samples that only decode (None if none does), and all other samples."""
        found = [(group, self._sample(group)) for group in groups]
        samples = [sample for _, sample in found if sample is not None]
        if self._batch is None or samples != self._batch.samples:
            self._samples = {sample.group: sample for sample in samples}
            self._batch = DecodeBatch.of(samples) if samples else None
        return self._batch, [group for group, sample in found if sample is None]

    def _sample(self, group: SequenceGroup) -> DecodingSample | None:
        sample = self._samples.get(group)
        if sample is not None and sample.version == group.version:
            return sample
        return DecodingSample.of(group) if only_decodes(group) else None


def only_decodes(group: SequenceGroup) -> bool:
    """Whether a sample, in free order, has nothing to compute but the newest tokens of its branches."""
    if not group.free_order:
        return False
    is_behind = is_decoding = False
    for segment in group.segments:
        num_left = len(segment.token_ids) - segment.num_computed
        if not segment.is_running:
            is_behind |= num_left > 0
        elif num_left != 1 or segment.num_computed < segment.num_prefill:
            return False
        else:
            is_decoding = True
    return is_decoding and not (is_behind and _is_read(group))


def _is_read(group: SequenceGroup) -> bool:
    """Whether a running branch reads a token of a finished one that is still to be computed."""
    is_needed = group.is_needed.tolist()
    return any(
        needed and not segment.is_running and segment.num_computed < segment.num_tokens
        for needed, segment in zip(is_needed, group.segments, strict=True)
    )
