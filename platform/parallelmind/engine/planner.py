"""The plan of one step: who is admitted and preempted, which tokens are computed, and in which blocks.

Planning is pure: it reads samples and blocks and changes neither.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, compress

import numpy as np

from parallelmind.engine.block_manager import (
    BLOCK,
    BlockDraft,
    BlockKey,
    BlockManager,
    CachedBlock,
    blocks_for,
    slots_of,
)
from parallelmind.engine.block_table import BlockTables
from parallelmind.engine.decode_batch import DecodeBatch, DecodeStep, missing_blocks
from parallelmind.engine.path_hash import PathHash
from parallelmind.engine.sequence import BranchState, ScheduledTokens, SegmentState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.engine.step_plan import Adoption, FilledBlocks, ForwardPlan, Plan, ScheduledGroup
from parallelmind.engine.token_scheduler import Progress, num_prefill, schedule_tokens
from parallelmind.tree import MAIN, Ints

_MAX_PASSED = 64  # samples that do not fit, before a plan stops to look for one that does


class Planner:
    """Makes one plan."""

    def __init__(
        self,
        manager: BlockManager,
        tables: BlockTables,
        budget: int,
        overdue_step: int,
        reuse: bool,
        give_way: Callable[[], bool],
    ) -> None:
        """budget: prompt tokens to compute at most. reuse: whether cached blocks are adopted.

        overdue_step: no sample is admitted past one that has waited since this step.
        give_way: called between samples; returns whether other threads may have changed some meanwhile.
        """
        self._manager, self._tables, self._reuse = manager, tables, reuse
        self._draft = BlockDraft(manager)
        self._budget, self._overdue_step = budget, overdue_step
        self._preempted: list[SequenceGroup] = []
        self._adopted: dict[SequenceGroup, list[Adoption]] = {}
        self._filled: set[BlockKey] = set()  # blocks that the plan computes
        self._ahead: dict[BranchState, int] = {}  # blocks of tokens that are computed already
        self._give_way, self._is_interrupted = give_way, False
        self._versions: dict[SequenceGroup, int] = {}  # of the samples when the plan began

    def plan(
        self,
        running: Sequence[SequenceGroup],
        waiting: Sequence[SequenceGroup],
        batch: DecodeBatch | None,
        others: Sequence[SequenceGroup],
        ahead: DecodeStep | None = None,
    ) -> Plan:
        """running, waiting: samples in the order of their age.

        batch: the running ones that only decode. others: the other running ones.
        ahead: a step that is computed already; the batch gets its blocks if it has all of its branches.
        A sample that changes while the plan is made is left out of it.
        """
        running, waiting = [*running], [*waiting]
        self._versions = {group: group.version for group in [*running, *waiting]}
        reserved = missing_blocks(batch, others, self._tables) if waiting else 0
        admitted = self._admit(waiting, reserved)
        others = [*others, *admitted]
        if batch is not None and not self._has_room(batch, others):
            batch, others = None, [*running, *admitted]
        if batch is not None and ahead is not None and ahead.rows_of(batch) is not None:
            self._hold_ahead(ahead, batch)
        scheduled = self._schedule_all(sorted(others, key=lambda group: group.id))
        forward = ForwardPlan(
            self._decode(batch) if batch else None,
            [item for item in scheduled if self._is_unchanged(item.group)],
        )
        adopted = (items for group, items in self._adopted.items() if self._is_unchanged(group))
        plan = Plan(
            preempted=tuple(group for group in self._preempted if group.is_admitted),
            admitted=tuple(filter(self._is_unchanged, admitted)),
            adopted=tuple(chain.from_iterable(adopted)),
            forward=forward,
        )
        if plan.groups or plan.adopted or self._is_interrupted:
            return plan
        return _without_progress(plan, [*running, *waiting])

    def _pause(self) -> None:
        """Let other threads in."""
        if self._give_way():
            self._is_interrupted = True
            self._draft.restart()

    def _is_unchanged(self, group: SequenceGroup) -> bool:
        return group.version == self._versions[group]

    def _has_room(self, batch: DecodeBatch, others: Sequence[SequenceGroup]) -> bool:
        """Whether there are blocks for all samples, so that it does not matter who gets them first.

        Every segment of the others may adopt one block in part.
        """
        num_full = int(np.count_nonzero(self._tables.num_free[batch.tables] == 0))
        missing = sum(group.missing_blocks + len(group.segments) for group in others)
        return num_full + missing <= self._draft.num_available

    def _hold_ahead(self, ahead: DecodeStep, batch: DecodeBatch) -> None:
        blocks = ahead.new_blocks()
        self._ahead = {branch: blocks[branch] for branch in batch.branches if branch in blocks}
        self._draft.hold(self._ahead.values())

    def _decode(self, batch: DecodeBatch) -> DecodeStep | None:
        """The next step of the samples that only decode."""
        unchanged = batch.unchanged()
        if unchanged is None:
            return None
        full = np.flatnonzero(self._tables.num_free[unchanged.tables] == 0)
        if self._ahead:
            blocks: list[int] | None = [self._ahead[unchanged.branches[row]] for row in full.tolist()]
        else:
            blocks = self._draft.allocate(len(full))
        assert blocks is not None, "there is room"
        return unchanged.step(self._tables, full, blocks)

    def _schedule_all(self, groups: Sequence[SequenceGroup]) -> list[ScheduledGroup]:
        """Plan the tokens of samples, the oldest first."""
        shares = prefill_shares([group.num_waiting_prefill for group in groups], self._budget)
        open_groups, unused, scheduled = deque(zip(groups, shares, strict=True)), 0, list[ScheduledGroup]()
        while open_groups:
            group, share = open_groups.popleft()
            self._pause()
            if not self._is_unchanged(group):
                continue
            item, used = self._schedule(group, share + unused, open_groups)
            unused = max(unused + share - used, 0)
            scheduled += [item] if item else []
        return scheduled

    def _admit(self, waiting: Sequence[SequenceGroup], reserved: int) -> list[SequenceGroup]:
        """Waiting samples whose known tokens fit beside those of all running samples, the oldest first.

        reserved: blocks that the running samples will need for theirs.
        One that does not fit is passed over, unless it is overdue.
        """
        admitted, num_passed = list[SequenceGroup](), 0
        for group in waiting:
            if reserved >= self._draft.num_available or num_passed == _MAX_PASSED:
                break
            self._pause()
            if not self._is_unchanged(group):
                continue
            adopted = self._adopt(group)
            full = sum(count == BLOCK for adoption in adopted for _, count in adoption.blocks)
            needed = group.missing_blocks - full
            if needed + reserved <= self._draft.num_available:
                self._adopted[group] = adopted
                admitted.append(group)
                reserved += needed
                continue
            self._release(adopted)
            num_passed += 1
            if group.waits_since_step <= self._overdue_step:
                break
        return admitted

    def _schedule(
        self, group: SequenceGroup, budget: int, others: deque[tuple[SequenceGroup, int]]
    ) -> tuple[ScheduledGroup | None, int]:
        """Plan the tokens of a sample; returns them and how many of them are prefill.

        others: samples that are not planned yet, of which the newest are preempted if blocks are lacking.
        Without them the sample waits for blocks.
        """
        if budget <= 0 and not group.is_decoding:
            return None, 0
        adopted = [] if group in self._adopted or budget <= 0 else self._adopt(group)
        progress = self._progress(group, adopted, budget)
        tokens = schedule_tokens(group, budget, progress)
        needed = _needed_blocks(group, tokens)
        blocks = self._allocate(int(needed.sum()), others)
        if blocks is None:
            self._release(adopted)
            return None, 0
        if adopted:
            self._adopted[group] = adopted
        if not len(tokens.ids):
            return None, 0
        filled = self._fill(group, tokens, progress) if self._reuse else ()
        item = ScheduledGroup(group, tokens, *_place(group, tokens, needed, blocks), filled)
        return item, num_prefill(group, tokens, progress)

    def _allocate(self, count: int, others: deque[tuple[SequenceGroup, int]]) -> list[int] | None:
        """Blocks, for which the newest of `others` are preempted if too few are left; None without others."""
        while (blocks := self._draft.allocate(count)) is None and others:
            self._preempt(others.pop()[0])
        return blocks

    def _preempt(self, group: SequenceGroup) -> None:
        self._preempted.insert(0, group)
        self._draft.free([block for segment in group.segments for block in segment.table.blocks])

    # Reuse of cached blocks

    def _adopt(self, group: SequenceGroup) -> list[Adoption]:
        """Cached blocks that hold the next tokens of a sample's segments; they are held from now on."""
        adopted, ends = list[Adoption](), group.num_adoptable()
        for segment in group.segments if self._reuse and group.is_finite else ():
            if _begins_block(group, segment):
                blocks, path = self._match(segment, ends[segment.number], self._max_partial(group, adopted))
                if blocks:
                    adopted.append(Adoption(group, segment, tuple(blocks), path))
                    self._draft.hold(block for block, _ in blocks)
        return adopted

    def _release(self, adopted: Sequence[Adoption]) -> None:
        for adoption in adopted:
            self._draft.free([block for block, _ in adoption.blocks])

    def _progress(self, group: SequenceGroup, adopted: Sequence[Adoption], budget: int) -> Progress:
        """How far a sample is computed, and which of its segments wait for blocks that this plan computes."""
        progress = Progress.of(group)
        adopted = self._adopted.get(group, adopted)
        for adoption in adopted:
            progress.num_computed[adoption.segment.number] = adoption.path.length
        next_column = 0 if group.free_order else int(progress.num_computed[MAIN])
        paths = {adoption.segment.number: adoption.path for adoption in adopted}
        deferred, keys, adoptable = set(), set[BlockKey](), group.num_adoptable()
        waits = self._reuse and budget > 0 and group.is_finite
        for segment in compress(group.segments, group.is_needed.tolist()) if waits else ():
            path = paths.get(segment.number, segment.path)
            if path is None or not segment.num_waiting_prefill:
                continue
            next_ids = segment.token_ids[path.length : path.length + BLOCK]
            key = path.copy().extend(next_ids), len(next_ids)
            begins_block = path.length == progress.num_computed[segment.number]
            is_computed = key in keys or key in self._filled
            if begins_block and is_computed and path.length < adoptable[segment.number]:
                deferred.add(segment.number)
            if len(next_ids) == BLOCK:
                keys.add(key)
        return Progress(progress.num_computed, max(progress.next_column, next_column), deferred)

    def _max_partial(self, group: SequenceGroup, adopted: Sequence[Adoption]) -> int:
        """How many more blocks a sample may use in part, so that it still fits an empty cache."""
        num_partial = group.num_partial
        num_partial += sum(count < BLOCK for adoption in adopted for _, count in adoption.blocks)
        return self._manager.num_blocks - group.max_blocks - num_partial

    def _match(self, segment: SegmentState, end: int, max_partial: int) -> tuple[list[CachedBlock], PathHash]:
        """Cached blocks of the segment's next tokens before `end`, and the path up to their end.

        Tokens whose logits are needed are not adopted, such as the last one of a running segment.
        """
        assert segment.path is not None, "only segments with a path have cached blocks"
        path, blocks = segment.path, list[CachedBlock]()
        ids = segment.token_ids
        while path.length < end:
            next_ids = ids[path.length : path.length + BLOCK]
            block = self._manager.find((path.copy().extend(next_ids), len(next_ids)))
            num_tokens = min(len(next_ids), end - path.length)
            if block is None:
                block, num_tokens = self._match_partial(path, next_ids[:num_tokens])
            if block is None or (num_tokens < BLOCK and max_partial <= 0):
                break
            max_partial -= num_tokens < BLOCK
            blocks.append(CachedBlock(block, num_tokens))
            path = path.copy()
            path.extend(next_ids[:num_tokens])
        return blocks, path

    def _match_partial(self, path: PathHash, next_ids: Sequence[int]) -> tuple[int | None, int]:
        """The cached block that ends within the next tokens, and its number of tokens; the longest one."""
        found: tuple[int | None, int] = None, 0
        if self._manager.has_partial(path.digest()):
            for count in range(1, len(next_ids) + 1):
                block = self._manager.find((path.copy().extend(next_ids[:count]), count))
                found = found if block is None else (block, count)
        return found

    def _fill(
        self, group: SequenceGroup, tokens: ScheduledTokens, progress: Progress
    ) -> tuple[FilledBlocks, ...]:
        """The blocks that a step fills, by segment."""
        paths = {adoption.segment.number: adoption.path for adoption in self._adopted.get(group, ())}
        filled = []
        for number in _filling(group, tokens):
            segment, end = group.segments[number], int(progress.num_computed[number] + tokens.counts[number])
            path = paths.get(number, segment.path)
            if path is not None:
                filled.append(FilledBlocks.of(group, segment, path, end))
                self._filled.update(filled[-1].keys)
                paths[number] = filled[-1].path
        ends = progress.num_computed + tokens.counts
        for number in np.flatnonzero(tokens.counts).tolist() if group.free_order else ():
            segment = group.segments[number]
            if segment.is_finished and ends[number] == segment.num_tokens:
                self._fill_end(segment, paths.get(number, segment.path))
        return tuple(filled)

    def _fill_end(self, segment: SegmentState, path: PathHash | None) -> None:
        """Note the last block of a text that is only read; it is cached although it is not full."""
        if path is not None and path.length < segment.num_tokens:
            last_ids = segment.token_ids[path.length :]
            self._filled.add((path.copy().extend(last_ids), len(last_ids)))


def prefill_shares(waiting: Sequence[int], budget: int) -> list[int]:
    """Divide a budget of prompt tokens among samples in the order of their age.

    waiting: tokens that each of them still has to compute. The oldest sample that waits gets half of the
    budget, so that it is not delayed by ever new ones. The rest goes to the shortest first, so that none of
    them waits behind a long prompt, and what they leave to the oldest.
    """
    shares = [0] * len(waiting)
    oldest = next((index for index, count in enumerate(waiting) if count), None)
    if oldest is None:
        return shares
    shares[oldest] = min(waiting[oldest], -(-budget // 2))
    left = budget - shares[oldest]
    for index in sorted(range(len(waiting)), key=waiting.__getitem__):
        if index != oldest:
            shares[index] = min(waiting[index], left)
            left -= shares[index]
    shares[oldest] += left
    return shares


def _begins_block(group: SequenceGroup, segment: SegmentState) -> bool:
    """Whether the next token of a segment begins a block, and is still to be computed before it decodes."""
    path = segment.path
    waits = segment.num_waiting_prefill and group.is_kept[segment.number]
    return bool(waits) and path is not None and path.length == segment.num_computed


def _filling(group: SequenceGroup, tokens: ScheduledTokens) -> list[int]:
    """The segments whose scheduled tokens fill a block; in column order main, if it has any."""
    if not group.free_order:
        return [MAIN] if tokens.counts[MAIN] else []
    free = _free_slots(group)
    return np.flatnonzero(tokens.counts >= np.where(free > 0, free, BLOCK)).tolist()


def _needed_blocks(group: SequenceGroup, tokens: ScheduledTokens) -> Ints:
    """`[tables]` blocks to allocate for the scheduled tokens; column order has one table."""
    if not group.free_order:
        return np.array([blocks_for(max(len(tokens.ids) - group.segments[MAIN].table.num_free, 0))])
    return -(-np.maximum(tokens.counts - _free_slots(group), 0) // BLOCK)


def _free_slots(group: SequenceGroup) -> Ints:
    """`[segments]` slots left at the end of each segment's last block."""
    free = (segment.table.num_free for segment in group.segments)
    return np.fromiter(free, np.int64, len(group.segments))


def _place(
    group: SequenceGroup, tokens: ScheduledTokens, needed: Ints, blocks: list[int]
) -> tuple[Ints, dict[int, list[int]]]:
    """`[tokens]` slots of the scheduled tokens, and the blocks of each segment."""
    counts = tokens.counts if group.free_order else np.array([len(tokens.ids)])
    tables = [segment.table for segment in group.segments[: len(counts)]]
    free = np.fromiter((table.num_free for table in tables), np.int64, len(tables))
    first = np.fromiter((table.next_slot for table in tables), np.int64, len(tables))
    table = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(table)) - np.repeat(np.cumsum(counts) - counts, counts)
    slots = first[table] + index
    is_new = index >= free[table]
    ends = np.cumsum(needed)
    new_index = (ends - needed)[table] * BLOCK + index - free[table]
    slots[is_new] = slots_of(blocks)[new_index[is_new]]
    by_segment = {
        int(number): blocks[ends[number] - needed[number] : ends[number]] for number in np.flatnonzero(needed)
    }
    return slots, by_segment


def _without_progress(plan: Plan, groups: Sequence[SequenceGroup]) -> Plan:
    """The plan in which no sample can go on. groups: all samples, the oldest first.

    Blocks that the oldest one uses in part may be too many for branches that were added later. It then begins
    again, and adopts fewer of them.
    """
    oldest = tuple(groups[:1])
    if oldest and oldest[0].num_partial:
        return replace(plan, preempted=oldest)
    return replace(plan, stuck=oldest)
