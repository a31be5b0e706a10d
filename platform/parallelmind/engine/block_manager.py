"""Blocks of the paged KV cache: which are free, allocated or cached, and which tokens they hold. No tensors.

The cache has one slot for each token, in blocks of `BLOCK` slots. Full blocks of a main can be reused by
other samples, under a hash of everything up to their end. A cached block without a reader stays until its
space is needed; the block that has been idle the longest is evicted first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from parallelmind.tree import Ints

BLOCK = 16  # tokens


def blocks_for(num_tokens: int) -> int:
    """Number of blocks that hold this many tokens."""
    return -(-num_tokens // BLOCK)


def prefix_keys(ids: Ints, adapter_version: str) -> list[bytes]:
    """A key for each full block of a main: a hash of the adapter version and all tokens up to its end."""
    key, keys = adapter_version.encode(), []
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        block = ids[end - BLOCK : end].astype(np.int64).tobytes()
        key = hashlib.blake2b(key + block, digest_size=16).digest()
        keys.append(key)
    return keys


class BlockTable:
    """The blocks of a growing sequence of tokens.

    slots, time, segment: `[length]`, the cache slot of each token, and the values that masks depend on.
    """

    def __init__(self, blocks: list[int]) -> None:
        self.blocks, self.length = blocks, 0
        self._slots = _slots_of(blocks)
        self._time, self._segment = np.zeros((2, len(self._slots)), np.int64)

    def append(self, time: Ints, segment: Ints) -> Ints:
        """Append tokens that are about to be computed; returns their slots."""
        start, self.length = self.length, self.length + len(time)
        self._time[start : self.length], self._segment[start : self.length] = time, segment
        return self.slots[start:]

    def extend(self, blocks: list[int]) -> None:
        """Append blocks."""
        self.blocks = self.blocks + blocks
        self._slots = np.append(self._slots, _slots_of(blocks))
        self._time, self._segment = (
            np.pad(values, (0, len(blocks) * BLOCK)) for values in (self._time, self._segment)
        )

    def trim(self, max_tokens: int) -> list[int]:
        """Remove and return the blocks that a sequence of at most `max_tokens` does not need."""
        kept = max(blocks_for(max_tokens), blocks_for(self.length))
        removed, self.blocks = self.blocks[kept:], self.blocks[:kept]
        self._slots, self._time, self._segment = (
            values[: kept * BLOCK] for values in (self._slots, self._time, self._segment)
        )
        return removed

    def release(self) -> list[int]:
        """Remove and return all blocks: their tokens are not read again."""
        self.length = 0
        return self.trim(0)

    @property
    def min_cache_slots(self) -> int:
        """Smallest size of a cache that contains these blocks, in slots."""
        return BLOCK * (max(self.blocks, default=-1) + 1)

    @property
    def slots(self) -> Ints:
        return self._slots[: self.length]

    @property
    def time(self) -> Ints:
        return self._time[: self.length]

    @property
    def segment(self) -> Ints:
        return self._segment[: self.length]


def _slots_of(blocks: list[int]) -> Ints:
    return (np.asarray(blocks, np.int64)[:, None] * BLOCK + np.arange(BLOCK)).ravel()


class BlockManager:
    """All blocks of the cache: free ones, allocated ones, and cached ones, which have a count of readers."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._is_free = np.ones(num_blocks, dtype=bool)
        self._readers: dict[int, int] = {}  # of cached blocks
        self._block_by_key: dict[bytes, int] = {}
        self._key_of_block: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached without a reader, longest idle first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can return: free ones, and cached ones without a reader."""
        return int(self._is_free.sum()) + len(self._idle)

    @property
    def num_allocated(self) -> int:
        return self.num_blocks - self.num_available

    def allocate(self, count: int) -> list[int] | None:
        """Allocate blocks, adjacent ones if there are any; None if too few are available."""
        if count > self.num_available:
            return None
        while int(self._is_free.sum()) < count:
            block, _ = self._idle.popitem(last=False)
            self._evict(block)
        free = np.flatnonzero(self._is_free)
        chosen = free[_first_run(free, count) :][:count]
        self._is_free[chosen] = False
        return [int(block) for block in chosen]

    def free(self, blocks: Sequence[int]) -> None:
        """Return blocks of `allocate` or `match_prefix`.

        Cached blocks become idle from the last to the first, so that the end of a main is evicted before its
        beginning.
        """
        for block in reversed(blocks):
            if block not in self._readers:
                self._is_free[block] = True
                continue
            self._readers[block] -= 1
            if self._readers[block]:
                continue
            if block in self._key_of_block:
                self._idle[block] = None
            else:
                del self._readers[block]
                self._is_free[block] = True

    def match_prefix(self, keys: Sequence[bytes]) -> list[int]:
        """Cached blocks of the longest prefix of these keys; each gets one more reader."""
        blocks: list[int] = []
        for key in keys:
            if (block := self._block_by_key.get(key)) is None:
                break
            self._readers[block] += 1
            self._idle.pop(block, None)
            blocks.append(block)
        return blocks

    def cache_block(self, key: bytes, block: int) -> None:
        """Let `match_prefix` return this computed block, unless the key is cached already.

        The holder of the block becomes its first reader.
        """
        if key not in self._block_by_key and block not in self._readers:
            self._block_by_key[key], self._key_of_block[block], self._readers[block] = block, key, 1

    def uncache(self, blocks: Sequence[int]) -> None:
        """Let `match_prefix` no longer return these blocks. Their readers keep them."""
        for block in blocks:
            if (key := self._key_of_block.pop(block, None)) is not None:
                del self._block_by_key[key]

    def _evict(self, block: int) -> None:
        del self._block_by_key[self._key_of_block.pop(block)], self._readers[block]
        self._is_free[block] = True


def _first_run(free: Ints, count: int) -> int:
    """Index in the sorted free blocks of the first run of `count` adjacent ones; 0 if there is none."""
    if count <= 1 or len(free) < count:
        return 0
    starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
    return int(starts[0]) if len(starts) else 0
