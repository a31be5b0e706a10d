"""Who holds which part of the key-value pool: plain Python and NumPy, no tensors.

The pool is a row of slots, one token each, in blocks. A stream is a text that grows in blocks of its own. It
is given all the blocks that it can ever fill when it begins, or none: what is promised is there. Full blocks
of a main can be shared, by the hash of everything before their end; they stay, after their last reader has
gone, until somebody needs the room.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from parallelmind.layout import Ints

BLOCK = 16  # tokens


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


def prefix_keys(ids: Ints, version: str) -> list[bytes]:
    """A key for each full block of a main: of its tokens, all before them, and of what computes them."""
    key, keys = version.encode(), []
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        key = hashlib.blake2b(
            key + ids[end - BLOCK : end].astype(np.int64).tobytes(), digest_size=16
        ).digest()
        keys.append(key)
    return keys


class BlockTable:
    """A text in the pool. slots, time, sequence: `[length]`, where each of its tokens lies and what a mask
    asks about it.
    """

    def __init__(self, blocks: list[int]) -> None:
        self.blocks, self.length = blocks, 0
        self._slots = _slots(blocks)
        self._time, self._sequence = np.zeros((2, len(self._slots)), np.int64)

    def append(self, time: Ints, sequence: Ints) -> Ints:
        """Enter tokens that are about to be computed; returns their slots."""
        start, self.length = self.length, self.length + len(time)
        self._time[start : self.length], self._sequence[start : self.length] = time, sequence
        return self.slots[start:]

    def give_up(self, tokens: int) -> list[int]:
        """The blocks that a stream of no more than `tokens` will not need; they are its own no longer."""
        kept = max(blocks_for(tokens), blocks_for(self.length))
        rest, self.blocks = self.blocks[kept:], self.blocks[:kept]
        self._slots, self._time, self._sequence = (
            part[: kept * BLOCK] for part in (self._slots, self._time, self._sequence)
        )
        return rest

    def give_up_all(self) -> list[int]:
        """All blocks: whatever they hold will not be read again."""
        self.length = 0
        return self.give_up(0)

    def grow(self, blocks: list[int]) -> None:
        self.blocks = self.blocks + blocks
        self._slots = np.append(self._slots, _slots(blocks))
        self._time, self._sequence = (
            np.pad(part, (0, len(blocks) * BLOCK)) for part in (self._time, self._sequence)
        )

    @property
    def extent(self) -> int:
        """The pool must have so many slots to hold it at its longest."""
        return BLOCK * (max(self.blocks, default=-1) + 1)

    @property
    def slots(self) -> Ints:
        return self._slots[: self.length]

    @property
    def time(self) -> Ints:
        return self._time[: self.length]

    @property
    def sequence(self) -> Ints:
        return self._sequence[: self.length]


def _slots(blocks: list[int]) -> Ints:
    return (np.asarray(blocks, np.int64)[:, None] * BLOCK + np.arange(BLOCK)).ravel()


class BlockManager:
    """The blocks of a pool: free ones, held ones, and shared ones that are kept although nobody reads
    them.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = np.ones(count, dtype=bool)
        self._readers: dict[int, int] = {}  # of shared blocks
        self._by_key: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # shared blocks without a reader, longest idle first

    @property
    def available(self) -> int:
        """Blocks that `take` could give."""
        return int(self._free.sum()) + len(self._idle)

    @property
    def held(self) -> int:
        return self.count - self.available

    def take(self, count: int) -> list[int] | None:
        """Blocks of one's own, side by side where there are any; None if there are too few."""
        if count > self.available:
            return None
        while int(self._free.sum()) < count:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        free = np.flatnonzero(self._free)
        chosen = free[_run(free, count) :][:count]
        self._free[chosen] = False
        return [int(block) for block in chosen]

    def give(self, blocks: Sequence[int]) -> None:
        """Return blocks that `take` or `find` has given; of a main, its end will be forgotten before its
        beginning.
        """
        for block in reversed(blocks):
            if block not in self._readers:
                self._free[block] = True
                continue
            self._readers[block] -= 1
            if not self._readers[block]:
                self._idle[block] = None

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The shared blocks that hold the longest known beginning of a main; they count one reader more
        each.
        """
        found: list[int] = []
        for key in keys:
            if (block := self._by_key.get(key)) is None:
                break
            self._readers[block] += 1
            self._idle.pop(block, None)
            found.append(block)
        return found

    def share(self, key: bytes, block: int) -> None:
        """From now on `find` knows this block, which has been computed and whose holder becomes its first
        reader.
        """
        if key not in self._by_key and block not in self._readers:
            self._by_key[key], self._key_of[block], self._readers[block] = block, key, 1

    def _forget(self, block: int) -> None:
        del self._by_key[self._key_of.pop(block)], self._readers[block]
        self._free[block] = True


def _run(free: Ints, count: int) -> int:
    """Where in the rising list of free blocks the first run of `count` neighbours begins; 0 if there is
    none.
    """
    if count <= 1 or len(free) < count:
        return 0
    starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
    return int(starts[0]) if len(starts) else 0
