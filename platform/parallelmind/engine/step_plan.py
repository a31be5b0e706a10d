"""The plan of one step: who is admitted and preempted, and which tokens are computed where. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from parallelmind.engine.block_manager import BLOCK, BlockKey, CachedBlock
from parallelmind.engine.branch_row import BranchRow
from parallelmind.engine.decode_batch import DecodeStep
from parallelmind.engine.path_hash import PathHash
from parallelmind.engine.sequence import BranchState, ScheduledTokens, SegmentState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.tree import Ints


class Adoption(NamedTuple):
    """Cached blocks that a segment uses in place of computing their tokens, and its path up to their end."""

    group: SequenceGroup
    segment: SegmentState
    blocks: tuple[CachedBlock, ...]
    path: PathHash


class FilledBlocks(NamedTuple):
    """Blocks of a segment that a step fills: their keys, and the segment's path up to their end."""

    group: SequenceGroup
    segment: SegmentState
    keys: tuple[BlockKey, ...]
    path: PathHash

    @staticmethod
    def of(group: SequenceGroup, segment: SegmentState, path: PathHash, end: int) -> FilledBlocks:
        """What is filled by computing a segment from the end of `path` up to its token `end`."""
        path, keys = path.copy(), list[BlockKey]()
        while path.length + BLOCK <= end:
            next_ids = segment.token_ids[path.length : path.length + BLOCK]
            keys.append((path.extend(next_ids), BLOCK))
        return FilledBlocks(group, segment, tuple(keys), path)


class ScheduledGroup(NamedTuple):
    """A sample, and its tokens that a step computes.

    slots: `[tokens]` slots that they are written to.
    blocks: blocks that are allocated for them, by segment; in column order all for main.
    """

    group: SequenceGroup
    tokens: ScheduledTokens
    slots: Ints
    blocks: dict[int, list[int]]
    filled: tuple[FilledBlocks, ...]


class SampledBranches(NamedTuple):
    """Branches that the rows of logits continue. pos2d: branch and time coordinates of their next tokens."""

    groups: list[SequenceGroup]
    branches: list[BranchState]
    rows: list[BranchRow]
    pos2d: list[tuple[int, int]]

    def add_step(self, step: DecodeStep) -> None:
        batch = step.batch
        self.groups.extend(batch.groups)
        self.branches.extend(batch.branches)
        self.rows.extend(batch.rows)
        self.pos2d.extend(zip(batch.coordinate.tolist(), (step.time + 1).tolist(), strict=True))

    def add_item(self, item: ScheduledGroup) -> None:
        group, tokens, last = item.group, item.tokens, item.tokens.logits_indices
        branches = [group.branches[index] for index in tokens.sampled_branches.tolist()]
        self.groups.extend([group] * len(branches))
        self.branches.extend(branches)
        self.rows.extend(BranchRow(group, branch) for branch in branches)
        self.pos2d.extend(zip(tokens.branch[last].tolist(), (tokens.time[last] + 1).tolist(), strict=True))


class ForwardPlan(NamedTuple):
    """What one forward pass computes: the newest tokens of a batch, then the tokens of other samples."""

    decoding: DecodeStep | None
    scheduled: Sequence[ScheduledGroup]

    @property
    def groups(self) -> list[SequenceGroup]:
        """The samples, in the order of their tokens."""
        samples = self.decoding.batch.samples if self.decoding else ()
        return [*(sample.group for sample in samples), *(item.group for item in self.scheduled)]

    def each(self) -> list[ScheduledGroup]:
        """Every sample by itself, in the order of their tokens."""
        return [*(_each(self.decoding) if self.decoding else ()), *self.scheduled]

    def sampled(self) -> SampledBranches:
        """The branches that the pass samples tokens of, in the order of their logits."""
        sampled = SampledBranches([], [], [], [])
        if self.decoding:
            sampled.add_step(self.decoding)
        for item in self.scheduled:
            sampled.add_item(item)
        return sampled

    @property
    def scores_prompts(self) -> bool:
        """Whether the pass computes log-probabilities of prompt tokens."""
        return any(len(item.tokens.labels.positions) for item in self.scheduled)

    def filled(self) -> list[FilledBlocks]:
        """The blocks of all samples that the pass fills."""
        decoding = _filled(self.decoding) if self.decoding else ()
        return [*decoding, *(filled for item in self.scheduled for filled in item.filled)]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one step does. Samples are in the order of their age.

    stuck: the oldest sample, if the cache cannot hold it although no other one can be preempted.
    """

    preempted: tuple[SequenceGroup, ...]
    admitted: tuple[SequenceGroup, ...]
    adopted: tuple[Adoption, ...]
    forward: ForwardPlan
    stuck: tuple[SequenceGroup, ...] = ()

    @property
    def groups(self) -> list[SequenceGroup]:
        """All samples that the plan concerns."""
        return [*self.preempted, *self.admitted, *self.forward.groups]


def _each(step: DecodeStep) -> list[ScheduledGroup]:
    batch, items, start = step.batch, [], 0
    new_blocks = dict(zip(step.full.tolist(), step.blocks, strict=True))
    for sample in batch.samples:
        own = slice(start, start + len(sample.branches))
        start = own.stop
        tokens = ScheduledTokens(
            ids=step.ids[own],
            segment=sample.number,
            branch=sample.coordinate,
            time=step.time[own],
            position=step.time[own],
            counts=np.bincount(sample.number, minlength=len(sample.group.segments)),
            next_column=0,
            logits_indices=np.arange(len(sample.branches)),
            sampled_branches=sample.number - 1,
        )
        indices = enumerate(sample.number.tolist(), own.start)
        blocks = {number: [new_blocks[index]] for index, number in indices if index in new_blocks}
        items.append(ScheduledGroup(sample.group, tokens, step.slots[own], blocks, ()))
    return items


def _filled(step: DecodeStep) -> list[FilledBlocks]:
    filling = np.flatnonzero(step.slots % BLOCK == BLOCK - 1).tolist()
    branches = [(step.batch.groups[index], step.batch.branches[index]) for index in filling]
    return [
        FilledBlocks.of(group, branch, branch.path, branch.num_computed + 1)
        for group, branch in branches
        if branch.path is not None
    ]
