"""Blocks of the paged KV cache: which are available, held or cached, and which tokens they hold. No tensors.

The cache has one slot for each token, in blocks of `BLOCK` slots. Computed blocks can be reused by every
segment that continues the same path, under a hash of all that their keys and values depend on. A cached
block without a holder stays until its space is needed; the block that has been idle the longest is evicted
first. Every operation takes constant time for each block.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from parallelmind.tree import Ints

BLOCK = 16  # tokens

BlockKey = tuple[bytes, int]  # the hash of a path up to the end of a block, and the block's number of tokens


def blocks_for(num_tokens: int) -> int:
    """Number of blocks that hold this many tokens."""
    return -(-num_tokens // BLOCK)


def slots_of(blocks: Sequence[int]) -> Ints:
    """`[blocks * BLOCK]` slots of these blocks."""
    return (np.asarray(blocks, np.int64)[:, None] * BLOCK + np.arange(BLOCK)).ravel()


class CachedBlock(NamedTuple):
    """The first `num_tokens` slots of a cached block."""

    block: int
    num_tokens: int


class BlockManager:
    """All blocks of the cache.

    A block has a number of holders. One without a holder is available: `allocate` returns blocks that are not
    cached first, then the cached ones, the longest idle first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._available: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_by_key: dict[BlockKey, int] = {}
        self._key_of_block: dict[int, BlockKey] = {}
        self._partial: dict[int, bytes] = {}  # cached blocks that are not full: the hash of all before them
        self._num_partial: Counter[bytes] = Counter()  # how many of them follow a hash

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated: free ones, and cached ones without a holder."""
        return len(self._available)

    @property
    def num_allocated(self) -> int:
        return self.num_blocks - self.num_available

    def find(self, key: BlockKey) -> int | None:
        """The cached block with this key."""
        return self._block_by_key.get(key)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of these blocks."""
        for block in blocks:
            self._holders[block] += 1
            self._available.pop(block, None)

    def free(self, blocks: Sequence[int]) -> None:
        """Remove a holder from each of these blocks.

        Cached blocks become available from the last to the first, so that the end of a path is evicted before
        its beginning.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            self._available[block] = None
            if block not in self._key_of_block:
                self._available.move_to_end(block, last=False)

    def has_partial(self, before: bytes) -> bool:
        """Whether a block that is not full is cached after this hash."""
        return before in self._num_partial

    def cache(self, key: BlockKey, block: int, before: bytes | None = None) -> None:
        """Let `find` return this computed block, unless the key is cached already.

        before: for a block that is not full, the hash of the path up to its beginning.
        """
        if key in self._block_by_key or block in self._key_of_block:
            return
        self._block_by_key[key], self._key_of_block[block] = block, key
        if before is not None:
            self._partial[block] = before
            self._num_partial[before] += 1

    def uncache(self, blocks: Iterable[int]) -> None:
        """Let `find` no longer return these blocks: their values are, or will be, other ones."""
        for block in blocks:
            if (key := self._key_of_block.pop(block, None)) is not None:
                del self._block_by_key[key]
            if (before := self._partial.pop(block, None)) is not None:
                self._num_partial[before] -= 1
                if not self._num_partial[before]:
                    del self._num_partial[before]


class BlockDraft:
    """Allocations that a plan makes. The manager is not changed."""

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        self.restart()
        self._freed: deque[int] = deque()
        self._holders: dict[int, int] = {}  # of the blocks that the plan holds or frees
        self.num_available = manager.num_available

    def restart(self) -> None:
        """Look at all available blocks again, after the manager has freed some."""
        self._queue: Iterator[int] = iter(self._manager._available)

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to each of these blocks."""
        for block in blocks:
            holders = self._num_holders(block)
            self._holders[block] = holders + 1
            self.num_available -= not holders

    def free(self, blocks: Sequence[int]) -> None:
        """Remove a holder from each of these blocks. The last ones are allocated first."""
        for block in reversed(blocks):
            self._holders[block] = self._num_holders(block) - 1
            if not self._holders[block]:
                self._freed.append(block)
                self.num_available += 1

    def allocate(self, count: int) -> list[int] | None:
        """Blocks without a holder, which are held then; None if too few are available."""
        if count > self.num_available:
            return None
        blocks: list[int] = []
        while len(blocks) < count:
            block = next(self._queue, None)
            block = self._freed.popleft() if block is None else block
            if not self._num_holders(block):
                self.hold([block])
                blocks.append(block)
        return blocks

    def _num_holders(self, block: int) -> int:
        return self._holders.get(block, self._manager._holders[block])
