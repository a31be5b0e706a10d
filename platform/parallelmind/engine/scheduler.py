"""Which samples are decoded, and which of their tokens the next step computes. Plain Python and NumPy.

Admission is FIFO and allocates for the worst case, so an admitted sample is never preempted. A step computes
the newest token of every decoding branch, and prompts within its budget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallelmind.engine.block_manager import BLOCK, BlockManager, blocks_for, prefix_keys
from parallelmind.engine.output import FinishReason
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.sequence import BranchState, ScheduledTokens
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.engine.token_scheduler import schedule_tokens
from parallelmind.errors import CapacityError, UserError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of an engine.

    cache_tokens: slots of the KV cache.
    max_prefill_tokens: prompt tokens that one step computes in addition to the newest decoded tokens.
    max_branches: branches of one sample.
    """

    cache_tokens: int
    max_prefill_tokens: int = 512
    max_branches: int = 256


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Load of an engine.

    waiting_tokens: prompt tokens that are still to be computed, of waiting and of running samples.
    held_tokens: cache slots that running samples hold.
    reused_share: share of all main tokens that were found in the cache.
    """

    waiting_samples: int
    waiting_branches: int
    running_samples: int
    live_branches: int
    waiting_tokens: int
    held_tokens: int
    cache_tokens: int
    reused_share: float


class ScheduledGroup(NamedTuple):
    """A sample, and its tokens that the next step computes."""

    group: SequenceGroup
    tokens: ScheduledTokens


class Scheduler:
    """Waiting and running samples, and the cache blocks that they hold.

    num_main_tokens, num_reused_tokens: tokens of all admitted mains, and those found in the cache.
    """

    def __init__(self, config: EngineConfig, reuse_prefixes: bool = True) -> None:
        """reuse_prefixes: whether samples reuse cached blocks of each other's mains."""
        self.config, self._reuse_prefixes = config, reuse_prefixes
        self.block_manager = BlockManager(config.cache_tokens // BLOCK)
        self.waiting: deque[SequenceGroup] = deque()
        self.running: list[SequenceGroup] = []
        self.num_main_tokens = self.num_reused_tokens = 0

    def submit(self, group: SequenceGroup) -> None:
        """Queue a sample. Raises UserError for one that would not fit an empty cache."""
        branches = len(group.branches) + (group.reduce is not None)
        if branches > self.config.max_branches:
            raise UserError(
                f"branches: {branches} given, {self.config.max_branches} allowed; split the sample"
            )
        self._require_fit(group.max_blocks)
        self.waiting.append(group)

    def add_branch(
        self, group: SequenceGroup, token_ids: Sequence[int], params: SamplingParams
    ) -> BranchState:
        """Add a branch to an unfinished sample.

        Raises UserError for one that could never fit, and CapacityError for one that does not fit now.
        """
        if len(group.branches) + (group.reduce is not None) >= self.config.max_branches:
            raise UserError(
                f"branches: the sample has {len(group.branches)}, the maximum; submit another sample"
            )
        new_tokens = len(token_ids) + params.max_new_tokens
        blocks = self._allocate_for_branch(group, new_tokens)
        branch = group.add_branch(token_ids, params)
        if blocks is not None:
            group.add_blocks(branch, blocks)
        return branch

    def schedule(self) -> list[ScheduledGroup]:
        """Admit waiting samples and choose the tokens of the next step; empty only if no sample is left."""
        while self.waiting and self._admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        scheduled, budget = [], self.config.max_prefill_tokens
        for group in self.running:
            if budget <= 0 and not group.is_decoding:
                continue
            before = group.num_prefill_computed
            scheduled.append(ScheduledGroup(group, schedule_tokens(group, max(budget, 0))))
            budget -= group.num_prefill_computed - before
        return scheduled

    def commit(self, scheduled: Sequence[ScheduledGroup]) -> None:
        """Register computed tokens: other samples can reuse the full blocks of these mains.

        Samples that were aborted during the forward pass no longer have blocks.
        """
        for group, _ in scheduled:
            if group.is_running:
                self._cache_main(group)

    def uncache_main(self, group: SequenceGroup) -> None:
        """Let no other sample reuse the blocks of this main, which hold values that are not finite."""
        self.block_manager.uncache(group.block_tables[0].blocks[: group.num_cached_blocks])

    def finish_branch(self, group: SequenceGroup, branch: BranchState, reason: FinishReason) -> None:
        """Finish a branch and free the blocks that are not read again.

        After the last one the reduce branch starts; without a reduce branch the sample is removed.
        """
        branch.finish_reason = reason
        if not group.is_running and group.reduce is None:
            self._free(group)
            return
        self._trim(group, branch)
        if not group.is_running:
            group.start_reduce()

    def abort(self, group: SequenceGroup, reason: FinishReason = "cancelled") -> None:
        """End the running branches of a sample, and its reduce branch."""
        for branch in group.running_branches:
            branch.finish_reason = reason
        self._free(group)

    def stats(self) -> EngineStats:
        return EngineStats(
            waiting_samples=len(self.waiting),
            waiting_branches=sum(len(group.branches) for group in self.waiting),
            running_samples=len(self.running),
            live_branches=sum(len(group.running_branches) for group in self.running),
            waiting_tokens=sum(group.num_waiting_prefill for group in [*self.waiting, *self.running]),
            held_tokens=self.block_manager.num_allocated * BLOCK,
            cache_tokens=self.block_manager.num_blocks * BLOCK,
            reused_share=self.num_reused_tokens / max(self.num_main_tokens, 1),
        )

    def _admit(self, group: SequenceGroup) -> bool:
        """Allocate all blocks that a sample can fill; False if too few are available."""
        group.prefix_keys = prefix_keys(group.main, group.adapter_version) if self._reuse_prefixes else []
        cached = self.block_manager.match_prefix(group.prefix_keys)
        allocated = self.block_manager.allocate(group.max_blocks - len(cached))
        if allocated is None:
            self.block_manager.free(cached)
            return False
        group.set_blocks(cached, allocated)
        self.num_main_tokens += len(group.main)
        self.num_reused_tokens += len(cached) * BLOCK
        return True

    def _cache_main(self, group: SequenceGroup) -> None:
        num_full = min(group.num_main_computed // BLOCK, len(group.prefix_keys))
        blocks = group.block_tables[0].blocks
        for index in range(group.num_cached_blocks, num_full):
            self.block_manager.cache_block(group.prefix_keys[index], blocks[index])
        group.num_cached_blocks = max(group.num_cached_blocks, num_full)

    def _allocate_for_branch(self, group: SequenceGroup, new_tokens: int) -> list[int] | None:
        """Blocks for one more branch; None for a waiting sample, which gets its blocks at admission."""
        admitted = group.block_table is not None
        if group.free_order:
            needed = blocks_for(new_tokens)
            self._require_fit(needed + group.max_blocks)
        else:
            held = len(group.block_tables[0].blocks) if admitted else 0
            total = blocks_for(group.max_group_tokens + new_tokens)
            needed = max(total - held, 0)
            self._require_fit(needed + held)
        if not admitted:
            return None
        blocks = self.block_manager.allocate(needed)
        if blocks is None:
            raise CapacityError(
                f"branches: the cache has no room for {new_tokens} more tokens now; try again later"
            )
        return blocks

    def _trim(self, group: SequenceGroup, branch: BranchState) -> None:
        """Free the unused blocks of a finished branch and, if no branch reads them, its used blocks."""
        if group.block_table is None:
            return
        if not group.free_order:
            self.block_manager.free(group.block_table.trim(group.max_group_tokens))
        elif branch.block_table is not None:
            table = branch.block_table
            unused = table.trim(branch.max_tokens) if group.keeps_finished else table.release()
            self.block_manager.free(unused)

    def _free(self, group: SequenceGroup) -> None:
        """Remove a sample and free its blocks."""
        if group.block_table is None:
            self.waiting.remove(group)
            return
        self.running.remove(group)
        self.block_manager.free(group.reduce_blocks)
        for table in group.block_tables:
            self.block_manager.free(table.release())

    def _require_fit(self, num_blocks: int) -> None:
        if num_blocks > self.block_manager.num_blocks:
            raise UserError(
                f"branches: need up to {num_blocks * BLOCK} tokens of cache, but the cache holds "
                f"{self.block_manager.num_blocks * BLOCK}; give fewer branches or lower max_new_tokens"
            )
