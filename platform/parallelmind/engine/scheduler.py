"""Which samples are decoded, and what the next forward pass reads of each. Plain Python and NumPy, no
tensors.

Samples are admitted in the order in which they came, each with all the blocks that it can ever fill, so that
whoever has begun can end. A step reads the newest token of every branch that is talking, and prompts in what
room is left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from parallelmind.config import RopeConfig
from parallelmind.engine.batch import SequenceBlocks
from parallelmind.engine.block_manager import BLOCK, BlockManager, BlockTable, blocks_for, prefix_keys
from parallelmind.engine.output import FinishReason
from parallelmind.engine.sequence import ScheduledTokens, SequenceState
from parallelmind.engine.sequence_group import Reduction, Running
from parallelmind.errors import CapacityError, UserError
from parallelmind.layout import MAIN, Tokens


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine takes on.

    cache_tokens: slots of the key-value pool. max_prefill_tokens: prompt tokens that one step may read beside the
    newest ones. max_branches: most branches of a sample.
    """

    cache_tokens: int
    max_prefill_tokens: int = 512
    max_branches: int = 256


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine is busy with. waiting_tokens: of prompts, still to be read. reused_share: of mains,
    found in the cache.
    """

    waiting_samples: int
    waiting_branches: int
    running_samples: int
    live_branches: int
    waiting_tokens: int
    held_tokens: int
    cache_tokens: int
    reused_share: float


class Scheduler:
    """Samples from their arrival to their end."""

    def __init__(self, limits: EngineConfig, shares: bool = True) -> None:
        """shares: whether what is computed of one sample's main can be read by others."""
        self.limits, self._shares = limits, shares
        self.blocks = BlockManager(limits.cache_tokens // BLOCK)
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self.prompt_tokens = self.reused_tokens = (
            0  # of mains that were admitted, and what of them was in the cache
        )
        self._count = 0

    def submit(
        self,
        tokens: Tokens,
        config: RopeConfig,
        most: Sequence[int],
        version: str,
        reduction: Reduction | None = None,
    ) -> Running:
        """Queue a sample. Raises UserError for one that would not fit if it were alone."""
        entry = Running(self._count, version, SequenceState(tokens, config), list(most), reduction)
        branches = tokens.branches + (reduction is not None)
        if branches > self.limits.max_branches:
            raise UserError(
                f"branches: {branches} given, {self.limits.max_branches} allowed; split the sample"
            )
        self._refuse_large(entry.blocks())
        self._count += 1
        self.waiting.append(entry)
        return entry

    def join(self, entry: Running, ids: Sequence[int], most: int) -> int:
        """Add a branch to a sample; returns its number. Raises UserError if it is too much, Overloaded if it
        is now.
        """
        if len(entry.most) + (entry.reduction is not None) >= self.limits.max_branches:
            raise UserError(
                f"branches: the sample has {len(entry.most)}, as many as allowed; begin another sample"
            )
        new, held = len(ids) + most, 0
        if entry.storage is not None and not entry.decoding.free:
            held = len(entry.storage.trunk.blocks)
        need = max(blocks_for(new if entry.decoding.free else entry.trunk_tokens() + new) - held, 0)
        self._refuse_large(need + held + (entry.blocks() if entry.decoding.free else 0))
        if entry.storage is not None:
            if (blocks := self.blocks.take(need)) is None:
                raise CapacityError(
                    f"branches: the cache has no room for {new} more tokens now; try again later"
                )
            entry.storage.grow(blocks)
        entry.most.append(most)
        return entry.decoding.join(ids)

    def schedule(self) -> list[tuple[Running, ScheduledTokens]]:
        """Admit who fits, and say what the next forward pass reads of whom; nothing only if nobody is
        there.
        """
        while self.waiting and self._admit(self.waiting[0]):
            self.running.append(self.waiting.popleft())
        return list(self._feeds())

    def _feeds(self) -> Iterator[tuple[Running, ScheduledTokens]]:
        room = self.limits.max_prefill_tokens
        for entry in self.running:
            if room <= 0 and not entry.talking:
                continue
            before = entry.decoding.prompts_fed
            feed = entry.decoding.feed(max(room, 0))
            room -= entry.decoding.prompts_fed - before
            yield entry, feed

    def computed(self, entry: Running) -> None:
        """After the forward pass: full blocks of main may be read by others from now on."""
        full = min(entry.decoding.main_fed // BLOCK, len(entry.keys))
        for place in range(entry.shared, full):
            self.blocks.share(entry.keys[place], entry.stored().trunk.blocks[place])
        entry.shared = max(entry.shared, full)

    def finish(self, entry: Running, branch: int, reason: FinishReason) -> int | None:
        """A branch has ended; what nobody can read any more is free. Returns the number of a reducing branch
        that begins now.
        """
        entry.decoding.finish(branch, reason)
        if entry.decoding.done and entry.reduction is None:
            self._leave(entry)
            return None
        self._shrink(entry, branch)
        if not entry.decoding.done or entry.reduction is None:
            return None
        reduction, entry.reduction = entry.reduction, None
        if entry.storage is not None and entry.decoding.free:
            entry.storage.grow(entry.reserved)
        entry.most.append(reduction.most)
        return entry.decoding.join(reduction.ids, reads_all=True)

    def drop(self, entry: Running) -> None:
        """Cancel whatever of a sample still goes on, or is still to come."""
        for branch in np.flatnonzero(entry.decoding.live).tolist():
            entry.decoding.finish(branch, "cancelled")
        self._leave(entry)

    def stats(self) -> EngineStats:
        everyone = [*self.waiting, *self.running]
        return EngineStats(
            waiting_samples=len(self.waiting),
            waiting_branches=sum(len(entry.most) for entry in self.waiting),
            running_samples=len(self.running),
            live_branches=sum(int(entry.decoding.live.sum()) for entry in self.running),
            waiting_tokens=sum(entry.decoding.waiting for entry in everyone),
            held_tokens=self.blocks.held * BLOCK,
            cache_tokens=self.blocks.count * BLOCK,
            reused_share=self.reused_tokens / max(self.prompt_tokens, 1),
        )

    def _admit(self, entry: Running) -> bool:
        entry.keys = prefix_keys(entry.decoding.main, entry.version) if self._shares else []
        found = self.blocks.find(entry.keys)
        trunk, branches = (
            blocks_for(entry.trunk_tokens()),
            [blocks_for(tokens) for tokens in entry.branch_tokens()],
        )
        blocks = self.blocks.take(trunk - len(found) + sum(branches))
        if blocks is None:
            self.blocks.give(found)
            return False
        own = trunk - len(found)
        stream = BlockTable(found + blocks[:own])
        known = np.arange(len(found) * BLOCK)
        stream.append(known, np.full_like(known, MAIN))
        entry.decoding.skip_main(len(known))
        entry.shared = len(found)
        cuts = np.cumsum([own, *branches])
        each = [blocks[start:end] for start, end in pairwise(cuts)]
        if entry.decoding.free and entry.reduction is not None:
            entry.reserved = each.pop()
        entry.storage = SequenceBlocks(stream, list(map(BlockTable, each)) if entry.decoding.free else None)
        self.prompt_tokens += len(entry.decoding.main)
        self.reused_tokens += len(known)
        return True

    def _shrink(self, entry: Running, branch: int) -> None:
        """Free what a branch that has ended will not fill and, where nobody reads it, what it has filled."""
        if entry.storage is None:
            return
        if not entry.decoding.free:
            self.blocks.give(entry.storage.trunk.give_up(entry.trunk_tokens()))
        elif entry.storage.branches is not None:
            stream = entry.storage.branches[branch]
            self.blocks.give(
                stream.give_up(entry.tokens_of(branch)) if entry.keeps_ended else stream.give_up_all()
            )

    def _leave(self, entry: Running) -> None:
        if entry.storage is None:
            self.waiting.remove(entry)
            return
        self.running.remove(entry)
        self.blocks.give(entry.reserved if entry.reduction is not None else [])
        for stream in [entry.storage.trunk, *(entry.storage.branches or [])]:
            self.blocks.give(stream.give_up_all())

    def _refuse_large(self, blocks: int) -> None:
        if blocks > self.blocks.count:
            raise UserError(
                f"branches: with all their new tokens they need {blocks * BLOCK} tokens of cache, and "
                f"{self.blocks.count * BLOCK} is all there is; give fewer branches or lower max_new_tokens"
            )
