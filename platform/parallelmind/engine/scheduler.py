"""Which samples are decoded, and the cache blocks that they hold. Plain Python and NumPy.

`schedule` plans a step and changes nothing. `begin` and `commit` apply a plan before and after its forward
pass. A step computes the newest token of every decoding branch, and prompts within its budget. Blocks are
allocated as they are needed. When they run out, the newest sample is preempted: its blocks are freed, and its
tokens are computed anew when there is room.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from time import monotonic
from typing import Literal, get_args

import numpy as np

from parallelmind.config.other_names import NamedFields
from parallelmind.engine.block_manager import BLOCK, BlockDraft, BlockManager
from parallelmind.engine.block_table import BlockTables
from parallelmind.engine.decode_batch import DecodeStep, DecodingSamples, missing_blocks
from parallelmind.engine.output import FinishReason
from parallelmind.engine.planner import Planner
from parallelmind.engine.sequence import BranchState, SegmentState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.engine.step_plan import Adoption, FilledBlocks, ForwardPlan, Plan, ScheduledGroup
from parallelmind.errors import UserError
from parallelmind.tree import MAIN

PrefillKind = Literal[
    "main", "document", "branch", "preempted"
]  # whose tokens are computed or found in the cache
PREFILL_KINDS: tuple[PrefillKind, ...] = get_args(PrefillKind)


@dataclass(frozen=True, slots=True)
class EngineConfig(NamedFields):
    """Limits of an engine.

    cache_tokens: slots of the KV cache.
    max_prefill_tokens: prompt tokens that one step computes in addition to the newest decoded tokens.
    max_branches: branches of one sample.
    prefill_share: share of `max_prefill_tokens` that a step computes while branches decode. It bounds how
        much long prompts slow down running branches.
    max_overtaken_steps: steps for which younger samples that fit are admitted past a waiting sample that does
        not. After that, younger ones wait until it is admitted.
    Raises UserError for a share that is not above 0 and up to 1, and for any other field that is no whole
    number, or too low.
    """

    cache_tokens: int
    max_prefill_tokens: int = 512
    max_branches: int = 256
    prefill_share: float = 0.5
    max_overtaken_steps: int = 200

    def __post_init__(self) -> None:
        if not 0 < self.prefill_share <= 1:
            raise UserError(f"prefill_share={self.prefill_share!r}: give a number above 0 and up to 1")
        least = {"cache_tokens": 1, "max_prefill_tokens": 1, "max_branches": 1, "max_overtaken_steps": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral) or value < lowest:
                raise UserError(f"{name}={value!r}: give a whole number from {lowest}")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Load of an engine.

    waiting_tokens: prompt tokens that are still to be computed, of waiting and of running samples.
    held_tokens: cache slots that running samples hold. reserved_tokens: further ones that they need for the
        tokens they have; no other sample is admitted to these.
    preemptions: how often a running sample has lost its cache blocks to an older one.
    waiting_s: seconds since each waiting sample was submitted.
    reused_share: share of all tokens to prefill that were found in the cache. reused_share_by_kind: the same
        for mains, for documents, for prompts of branches, and for samples that were preempted.
    documents_read, documents_written: documents that were read from the document cache, and written to it.
    """

    waiting_samples: int
    waiting_branches: int
    running_samples: int
    live_branches: int
    waiting_tokens: int
    held_tokens: int
    reserved_tokens: int
    cache_tokens: int
    preemptions: int
    waiting_s: tuple[float, ...]
    reused_share: float
    reused_share_by_kind: Mapping[PrefillKind, float]
    documents_read: int = 0
    documents_written: int = 0


class Scheduler:
    """Waiting and running samples, in the order of their age, and the cache blocks that they hold.

    num_steps: steps that have begun. num_preemptions: how often a running sample has lost its blocks.
    num_prefill, num_reused: tokens to prefill by kind, computed or found in the cache, and those found.
    """

    def __init__(self, config: EngineConfig, reuse_prefixes: bool = True) -> None:
        """reuse_prefixes: whether samples reuse cached blocks."""
        self.config, self._reuse_prefixes = config, reuse_prefixes
        self.block_manager = BlockManager(config.cache_tokens // BLOCK)
        self.tables = BlockTables(self.block_manager.num_blocks * BLOCK)
        self._decoding = DecodingSamples()
        self.waiting: list[SequenceGroup] = []
        self.running: list[SequenceGroup] = []
        self.num_steps = self.num_preemptions = 0
        self.num_prefill, self.num_reused = Counter[PrefillKind](), Counter[PrefillKind]()

    # Samples

    def submit(self, group: SequenceGroup) -> None:
        """Queue a sample. Raises UserError for one that would not fit an empty cache."""
        self.check_size(group)
        group.waits_since_step = self.num_steps
        self.waiting.append(group)

    def check_size(self, group: SequenceGroup) -> None:
        """Raise UserError for a sample with too many segments, and for one that could never fit the cache."""
        branches = len(group.branches)
        if branches > self.config.max_branches:
            raise UserError(
                f"branches: {branches} given, {self.config.max_branches} allowed; split the sample"
            )
        self._require_fit(group.max_blocks)

    def finish_branch(self, group: SequenceGroup, branch: BranchState, reason: FinishReason) -> None:
        """Finish a segment and free the blocks that are not read again; after the last one all of them."""
        group.finish(branch, reason)
        self._cache_last_block(group, branch)
        if not group.is_running:
            self._remove(group)
        elif group.free_order:
            for segment in group.segments:
                if segment.table.blocks and not group.is_kept[segment.number]:
                    self.block_manager.free(segment.reset())

    def abort(self, group: SequenceGroup, reason: FinishReason = "cancelled") -> None:
        """Finish all segments of a sample, and free its blocks."""
        for branch in group.branches:
            if not branch.is_finished:
                group.finish(branch, reason)
                self._cache_last_block(group, branch)
        self._remove(group)

    def stats(self) -> EngineStats:
        batch, others = self._decoding.divide(self.running)
        decoding = len(batch.branches) if batch else 0
        return EngineStats(
            waiting_samples=len(self.waiting),
            waiting_branches=sum(len(group.branches) for group in self.waiting),
            running_samples=len(self.running),
            live_branches=decoding + sum(len(group.running_branches) for group in others),
            waiting_tokens=sum(group.num_waiting_prefill for group in [*self.waiting, *others]),
            held_tokens=self.block_manager.num_allocated * BLOCK,
            reserved_tokens=missing_blocks(batch, others, self.tables) * BLOCK,
            cache_tokens=self.block_manager.num_blocks * BLOCK,
            preemptions=self.num_preemptions,
            waiting_s=tuple(monotonic() - group.submitted_at for group in self.waiting),
            reused_share=self.num_reused_tokens / max(self.num_prefill.total(), 1),
            reused_share_by_kind={
                kind: self.num_reused[kind] / max(self.num_prefill[kind], 1) for kind in PREFILL_KINDS
            },
        )

    @property
    def num_reused_tokens(self) -> int:
        """Tokens of all kinds that were found in the cache."""
        return self.num_reused.total()

    # Steps

    def schedule(self, give_way: Callable[[], bool] = lambda: False, ahead: DecodeStep | None = None) -> Plan:
        """Plan the next step. Nothing changes until `begin`.

        give_way: called between samples. Other threads may change samples meanwhile, if it returns true; the
        plan leaves these out. ahead: a step that is computed already, from `look_ahead`.
        """
        batch, others = self._decoding.divide(self.running)
        decodes = batch is not None or any(group.is_decoding for group in others)
        budget = math.ceil(self.config.max_prefill_tokens * (self.config.prefill_share if decodes else 1))
        overdue = self.num_steps - self.config.max_overtaken_steps
        planner = Planner(self.block_manager, self.tables, budget, overdue, self._reuse_prefixes, give_way)
        return planner.plan(self.running, self.waiting, batch, others, ahead)

    def begin(self, plan: Plan) -> None:
        """Preempt and admit samples, and prepare for a forward pass over the planned tokens.

        No later step depends on what the pass overwrites: if it raises, `abort` its samples.
        """
        self.num_steps += 1
        for group in plan.preempted:
            self._preempt(group)
        for group in plan.admitted:
            self.waiting.remove(group)
            insort(self.running, group, key=_age)
            group.is_admitted = True
        for adoption in plan.adopted:
            self._adopt(adoption)
        if plan.forward.decoding is not None:
            self.block_manager.uncache(plan.forward.decoding.blocks)
            plan.forward.decoding.stage(self.tables)
        for item in plan.forward.scheduled:
            item.group.frontier = max(item.group.frontier, item.tokens.next_column)
            for blocks in item.blocks.values():
                self.block_manager.uncache(blocks)
            _stage(item, self.tables)

    def look_ahead(self, step: DecodeStep) -> DecodeStep | None:
        """Stage the step after one that has begun, before it is known which branches end with that one.

        None if samples have changed since, if no branch can go on, and if blocks are lacking. Nothing but the
        staged tokens changes: `schedule` gives the same blocks to the branches that do go on.
        """
        continues = (branch.num_tokens + 1 < branch.max_tokens for branch in step.batch.branches)
        if step.batch.unchanged() is not step.batch or not any(continues):
            return None
        draft = BlockDraft(self.block_manager)
        draft.hold(step.blocks)
        following = step.following(self.tables, draft.allocate)
        if following is not None:
            self.block_manager.uncache(following.blocks)
            following.stage(self.tables)
        return following

    def filled(self, forward: ForwardPlan) -> list[FilledBlocks]:
        """The blocks that a forward pass fills. Needs no lock: only steps append to them."""
        return forward.filled() if self._reuse_prefixes else []

    def commit(self, forward: ForwardPlan, filled: Iterable[FilledBlocks]) -> None:
        """Count the tokens of a forward pass as computed; others can reuse the blocks that it filled.

        Samples that were aborted during the forward pass, and branches that have no blocks any more, are
        left out.
        """
        if forward.decoding is not None:
            self.block_manager.hold(forward.decoding.commit(self.tables))
        committed = [item for item in forward.scheduled if item.group.is_admitted]
        for item in committed:
            self._commit(item)
        for blocks in filled:
            self._cache_filled(blocks)
        for group, tokens, *_ in committed:
            for number in np.flatnonzero(tokens.counts).tolist():
                segment = group.segments[number]
                if segment.is_finished and not segment.num_waiting_prefill:
                    self._cache_last_block(group, segment)

    def mark_not_finite(self, group: SequenceGroup) -> None:
        """Let no other sample reuse the blocks of a sample whose values are not finite."""
        group.is_finite = False
        for segment in group.segments:
            self.block_manager.uncache(segment.table.blocks)

    def recompute(self, group: SequenceGroup) -> None:
        """Compute a sample anew, without cached blocks: one that it read holds values that are not finite."""
        self.mark_not_finite(group)
        group.has_adopted = False
        self._wait_again(group)

    def _preempt(self, group: SequenceGroup) -> None:
        for segment in group.segments:
            self._cache_last_block(group, segment)
        self._wait_again(group)
        group.num_preemptions += 1
        self.num_preemptions += 1

    def _wait_again(self, group: SequenceGroup) -> None:
        self.running.remove(group)
        self.block_manager.free(group.reset())
        insort(self.waiting, group, key=_age)
        group.waits_since_step = self.num_steps

    def _adopt(self, adoption: Adoption) -> None:
        group, segment, blocks, path = adoption
        self.block_manager.hold(block for block, _ in blocks)
        for cached in blocks:
            segment.table.adopt(self.tables, cached)
            segment.num_computed += cached.num_tokens
        segment.path, group.has_adopted = path, True
        group.next_column = 0 if group.free_order else segment.num_computed
        num_tokens, kind = sum(count for _, count in blocks), _kind(group, segment)
        self.num_prefill[kind] += num_tokens
        self.num_reused[kind] += num_tokens

    def _commit(self, item: ScheduledGroup) -> None:
        group, tokens = item.group, item.tokens
        group.next_column = tokens.next_column
        if not group.free_order:
            blocks = item.blocks.get(MAIN, [])
            self.block_manager.hold(blocks)
            group.segments[MAIN].table.commit(len(tokens.ids), blocks)
        for number in np.flatnonzero(tokens.counts).tolist():
            segment, count = group.segments[number], int(tokens.counts[number])
            if group.free_order and not segment.table.is_staged(count):
                continue
            if waiting := segment.num_waiting_prefill:
                self.num_prefill[_kind(group, segment)] += min(count, waiting)
            segment.num_computed += count
            if group.free_order:
                blocks = item.blocks.get(number, [])
                self.block_manager.hold(blocks)
                segment.table.commit(count, blocks)

    def _cache_filled(self, filled: FilledBlocks) -> None:
        group, segment, keys, path = filled
        if not group.is_finite or segment.num_computed < path.length:  # freed during the forward pass
            return
        assert segment.path is not None, "only segments with a path have keys"
        for key, block in zip(keys, segment.table.blocks[segment.path.num_blocks :], strict=False):
            self.block_manager.cache(key, block)
        segment.path = path

    def _cache_last_block(self, group: SequenceGroup, segment: SegmentState) -> None:
        """Let others reuse the block at the end of a segment that is not continued."""
        path = segment.path
        if path is None or not (self._reuse_prefixes and group.free_order and group.is_finite):
            return
        if (num_tokens := segment.table.length - path.length) > 0:  # a finished one may hold no block
            before, whole = path.digest(), path.copy()
            key = whole.extend(segment.token_ids[path.length : segment.table.length]), num_tokens
            self.block_manager.cache(key, segment.table.blocks[path.num_blocks], before)

    def _remove(self, group: SequenceGroup) -> None:
        """Remove a sample and free its blocks."""
        (self.running if group.is_admitted else self.waiting).remove(group)
        self.block_manager.free(group.reset())

    def _require_fit(self, num_blocks: int) -> None:
        if num_blocks > self.block_manager.num_blocks:
            raise UserError(
                f"branches: need up to {num_blocks * BLOCK} tokens of cache, but the cache holds "
                f"{self.block_manager.num_blocks * BLOCK}; give fewer branches or lower max_new_tokens"
            )


def _age(group: SequenceGroup) -> int:
    return group.id


def _kind(group: SequenceGroup, segment: SegmentState) -> PrefillKind:
    if group.num_preemptions:
        return "preempted"
    if segment.number == MAIN:
        return "main"
    return "document" if segment.number <= group.num_documents else "branch"


def _stage(item: ScheduledGroup, tables: BlockTables) -> None:
    """Note the scheduled tokens in their block tables."""
    group, tokens = item.group, item.tokens
    tables.place(item.slots, tokens.time, tokens.segment)
    if not group.free_order:
        group.segments[MAIN].table.stage(tables, len(tokens.ids), item.blocks.get(MAIN, ()))
        return
    for number in np.flatnonzero(tokens.counts).tolist():
        count = int(tokens.counts[number])
        group.segments[number].table.stage(tables, count, item.blocks.get(number, ()))
