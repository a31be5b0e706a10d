"""Block tables: the cache blocks of each sequence of tokens, in arrays that stay from step to step. No torch.

A decoding step changes a few numbers of each table, for all tables together. A kernel reads the arrays where
they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from parallelmind.engine.block_manager import BLOCK, CachedBlock
from parallelmind.tree import Ints

EMPTY_ROW = 0  # of a table without blocks
_ROWS, _WIDTH = 64, 16  # of new arrays, which double when they are full

Int32s = NDArray[np.int32]


class BlockTables:
    """The block tables of a cache, one in each row. Only the thread that runs the steps adds to a table.

    blocks: `[rows, width]` blocks of each table, in the order of their tokens.
    ends: `[rows, width]` number of the table's tokens up to the end of each block, were it full.
    length: `[rows]` computed tokens. staged: `[rows]` the same with the tokens of the running forward pass.
    num_blocks: `[rows]` blocks of the computed tokens. num_free: `[rows]` slots left in the last of them.
    next_slot: `[rows]` the first of these slots.
    time, segment: `[slots]` time coordinate and segment number of the token in each slot. A block that is
        reused holds tokens of the same time in every sample, but of another segment unless it is main.
    """

    def __init__(self, num_slots: int) -> None:
        self.time, self.segment = np.zeros((2, num_slots), np.int32)
        self.blocks, self.ends = np.zeros((2, _ROWS, _WIDTH), np.int32)
        self.length, self.staged = np.zeros((2, _ROWS), np.int64)
        self.num_blocks, self.num_free, self.next_slot = np.zeros((3, _ROWS), np.int64)
        self._unused = list(range(EMPTY_ROW + 1, _ROWS))

    def take_row(self) -> int:
        """A row without blocks."""
        if not self._unused:
            self._add_rows()
        return self._unused.pop()

    def return_row(self, row: int) -> None:
        """Empty a row. Its blocks stay readable for the running forward pass."""
        for column in self._columns():
            column[row] = 0
        self._unused.append(row)

    def append(self, rows: Ints | int, blocks: Ints | Sequence[int], ends: Ints) -> None:
        """Write the next block of each row, or the next blocks of one. The rows count them on `commit`."""
        index = self.num_blocks[rows] + (np.arange(len(blocks)) if isinstance(rows, int) else 0)
        while index.max() >= self.blocks.shape[1]:
            self._widen()
        self.blocks[rows, index], self.ends[rows, index] = blocks, ends

    def place(self, slots: Ints, time: Ints, segment: Ints) -> None:
        """Note which tokens a forward pass writes to these slots."""
        self.time[slots], self.segment[slots] = time, segment

    def commit(self, rows: Ints | int, counts: Ints | int, new_blocks: Ints | int) -> None:
        """Count `counts` staged tokens of each row as computed, and the blocks appended for them."""
        self.length[rows] += counts
        self.num_blocks[rows] += new_blocks
        self.num_free[rows] += BLOCK * new_blocks - counts
        last = self.blocks[rows, self.num_blocks[rows] - 1].astype(np.int64)
        self.next_slot[rows] = BLOCK * (last + 1) - self.num_free[rows]

    def slots(self, row: int, length: int) -> Ints:
        """`[length]` slots of the first tokens of a table, staged ones included."""
        if not length:
            return np.zeros(0, np.int64)
        stop = int(np.argmax(self.ends[row] >= length)) + 1
        ends = np.minimum(self.ends[row, :stop], length)
        counts = np.diff(ends, prepend=0)
        first = BLOCK * self.blocks[row, :stop].astype(np.int64) - (ends - counts)
        return np.repeat(first, counts) + np.arange(length)

    def _columns(self) -> tuple[Ints, ...]:
        return self.length, self.staged, self.num_blocks, self.num_free, self.next_slot

    def _widen(self) -> None:
        width = self.blocks.shape[1]
        self.blocks, self.ends = (np.pad(array, ((0, 0), (0, width))) for array in (self.blocks, self.ends))

    def _add_rows(self) -> None:
        rows = len(self.length)
        self._unused += range(rows, 2 * rows)
        self.blocks, self.ends = (np.pad(array, ((0, rows), (0, 0))) for array in (self.blocks, self.ends))
        self.length, self.staged, self.num_blocks, self.num_free, self.next_slot = (
            np.pad(column, (0, rows)) for column in self._columns()
        )


_NO_TABLES = BlockTables(0)


class BlockTable:
    """One table of `BlockTables`, which has a row while it holds blocks.

    A block that is adopted from the cache may be used in part: the next token then has another block.

    row: its row. blocks: all blocks, in the order of their tokens. num_partial: blocks that are used in part
    and not written any more.
    """

    __slots__ = ("_tables", "blocks", "num_partial", "row")

    def __init__(self) -> None:
        self._tables, self.row = _NO_TABLES, EMPTY_ROW
        self.blocks: list[int] = []
        self.num_partial = 0

    @property
    def length(self) -> int:
        """Number of computed tokens."""
        return int(self._tables.length[self.row])

    @property
    def num_free(self) -> int:
        """Slots left at the end of the last block."""
        return int(self._tables.num_free[self.row])

    @property
    def next_slot(self) -> int:
        """The first free slot; not valid if there is none."""
        return int(self._tables.next_slot[self.row])

    @property
    def slots(self) -> Ints:
        """`[length]` cache slot of each token."""
        return self._tables.slots(self.row, self.length)

    def clear(self) -> list[int]:
        """Remove and return all blocks: their tokens are not read again."""
        if self.row != EMPTY_ROW:
            self._tables.return_row(self.row)
        blocks = self.blocks
        self.__init__()  # type: ignore[misc]
        return blocks

    def adopt(self, tables: BlockTables, cached: CachedBlock) -> None:
        """Append the tokens of a cached block. tables: where the table gets a row, if it has none."""
        self._enter(tables)
        assert not self.num_free, "a block that is being written is filled first"
        length = self.length + cached.num_tokens
        tables.append(self.row, [cached.block], np.array([length]))
        self.blocks.append(cached.block)
        self.num_partial += cached.num_tokens < BLOCK
        tables.length[self.row] = tables.staged[self.row] = length
        tables.num_blocks[self.row] += 1

    def stage(self, tables: BlockTables, count: int, blocks: Sequence[int]) -> None:
        """Note tokens of a forward pass behind the computed ones. `commit` counts them as computed.

        blocks: allocated for them. tables: where the table gets a row, if it has none.
        """
        self._enter(tables)
        if blocks:
            ends = self.length + self.num_free + BLOCK * (1 + np.arange(len(blocks)))
            tables.append(self.row, blocks, ends)
        tables.staged[self.row] = self.length + count

    def is_staged(self, count: int) -> bool:
        """Whether this many tokens are staged; none are in a table that was cleared during the pass."""
        return bool(self._tables.staged[self.row] == self.length + count)

    def commit(self, count: int, blocks: Sequence[int]) -> None:
        """Append `count` staged tokens, for which these blocks were allocated."""
        self.blocks += blocks
        self._tables.commit(self.row, count, len(blocks))

    def _enter(self, tables: BlockTables) -> None:
        if self.row == EMPTY_ROW:
            self._tables, self.row = tables, tables.take_row()
