"""Allocation, reuse and eviction of cache blocks, by example and at random."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from parallelmind.engine.block_manager import (
    BLOCK,
    BlockDraft,
    BlockManager,
    CachedBlock,
    blocks_for,
)
from parallelmind.engine.block_table import BlockTable, BlockTables


def allocate(manager: BlockManager, count: int) -> list[int] | None:
    blocks = BlockDraft(manager).allocate(count)
    manager.hold(blocks or [])
    manager.uncache(blocks or [])
    return blocks


def key(index: int) -> tuple[bytes, int]:
    return bytes([index]), BLOCK


def cached(manager: BlockManager, *indices: int) -> list[int]:
    """Allocate blocks and cache them under these keys."""
    blocks = allocate(manager, len(indices)) or []
    for index, block in zip(indices, blocks, strict=True):
        manager.cache(key(index), block)
    return blocks


def test_tokens_take_whole_blocks():
    assert [blocks_for(tokens) for tokens in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]


def test_allocation_fails_as_a_whole_if_too_few_blocks_are_available():
    manager = BlockManager(4)
    assert allocate(manager, 5) is None
    assert allocate(manager, 3) == [0, 1, 2]
    assert (manager.num_available, manager.num_allocated) == (1, 3)
    assert allocate(manager, 2) is None
    assert allocate(manager, 0) == []


def test_freed_blocks_are_allocated_again_in_their_order():
    manager = BlockManager(8)
    allocate(manager, 8)
    manager.free([4, 5, 6])
    assert allocate(manager, 3) == [4, 5, 6]


def test_a_draft_changes_nothing():
    manager = BlockManager(3)
    manager.free(cached(manager, 1))
    draft = BlockDraft(manager)
    draft.hold([0])
    assert draft.allocate(3) is None
    assert draft.allocate(2) == [1, 2]
    draft.free([0, 2])
    assert draft.num_available == 2
    assert draft.allocate(2) == [0, 2]
    assert (manager.num_available, manager.find(key(1))) == (3, 0)


def test_a_cached_block_is_held_until_its_last_holder_frees_it():
    manager = BlockManager(4)
    first = cached(manager, 1, 2)
    manager.hold(first)
    manager.free(first)
    assert manager.num_allocated == 2
    manager.free(first)
    assert manager.num_allocated == 0
    assert [manager.find(key(index)) for index in (1, 2, 3)] == [*first, None], "no one has needed the blocks"


def test_the_longest_idle_block_is_evicted_first_and_the_end_of_a_path_before_its_beginning():
    manager = BlockManager(4)
    old = cached(manager, 9)
    manager.free(old)
    manager.free(cached(manager, 1, 2, 3))
    manager.hold(old)
    manager.free(old)  # used again: now the youngest
    allocate(manager, 2)
    assert [manager.find(key(index)) is None for index in (1, 2, 3, 9)] == [False, True, True, False]


def test_blocks_with_holders_are_never_evicted():
    manager = BlockManager(3)
    own = cached(manager, 1, 2)
    assert allocate(manager, 2) is None
    assert allocate(manager, 1) is not None
    assert [manager.find(key(index)) for index in (1, 2)] == own


def test_a_path_computed_twice_is_cached_once():
    manager = BlockManager(4)
    first, second = cached(manager, 1), cached(manager, 1)
    assert [manager.find(key(1))] == first
    manager.free(second)
    manager.free(first)
    assert manager.num_available == 4


def test_blocks_that_are_not_full_are_known_by_what_precedes_them_until_they_are_evicted():
    manager = BlockManager(2)
    manager.hold([0, 1])
    for block, end in enumerate((b"one", b"two")):
        manager.cache((end, 3), block, before=b"start")
    manager.uncache([0])
    assert manager.has_partial(b"start")
    manager.uncache([1])
    assert not manager.has_partial(b"start")


@settings(max_examples=60, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_no_block_is_lost_or_held_twice(seed: int) -> None:
    """Paths of up to six blocks, of which the first ones may be shared, are held and freed at random."""
    rng, manager = random.Random(seed), BlockManager(12)
    held: list[list[int]] = []
    for _ in range(80):
        if held and rng.random() < 0.4:
            manager.free(held.pop(rng.randrange(len(held))))
            continue
        path = [key(rng.choice([1, 2]) * 10 + index) for index in range(rng.randint(1, 6))]
        blocks: list[int] = []
        for item in path:
            if (found := manager.find(item)) is None:
                break
            blocks.append(found)
        manager.hold(blocks)
        own = allocate(manager, len(path) - len(blocks))
        if own is None:
            manager.free(blocks)
            continue
        assert not {block for other in held for block in other} & set(own)
        for item, block in zip(path[len(blocks) :], own, strict=True):
            manager.cache(item, block)
        held.append(blocks + own)
        counts = Counter(block for other in held for block in other)
        assert counts == Counter(dict(enumerate(manager._holders)))
        assert manager.num_allocated == len(counts)
    for blocks in held:
        manager.free(blocks)
    assert len(allocate(manager, 12) or []) == 12


def slots_of_rows(tables: BlockTables, *rows: int) -> list[list[int]]:
    """The slots of all staged tokens of rows."""
    return [tables.slots(row, int(tables.staged[row])).tolist() for row in rows]


def test_a_block_table_holds_its_tokens_in_order():
    tables, table = BlockTables(5 * BLOCK), BlockTable()
    table.stage(tables, 3, [3])
    table.commit(3, [3])
    assert (table.length, table.num_free, table.next_slot) == (3, 13, 51)
    table.stage(tables, 17, [1])
    table.commit(17, [1])
    assert table.slots.tolist() == [*range(48, 64), *range(16, 20)]
    assert (table.num_free, table.next_slot) == (12, 20)
    row = table.row
    assert table.clear() == [3, 1]
    assert (table.length, table.slots.tolist()) == (0, [])
    assert tables.take_row() == row


def test_staged_tokens_count_once_they_are_committed():
    tables, table = BlockTables(2 * BLOCK), BlockTable()
    table.stage(tables, 2, [0])
    assert slots_of_rows(tables, table.row) == [[0, 1]]
    assert (table.length, table.is_staged(2)) == (0, True)
    table.stage(tables, 1, [1])
    table.commit(1, [1])
    assert table.slots.tolist() == [16]


def test_an_adopted_block_that_is_used_in_part_is_not_written():
    tables, table = BlockTables(10 * BLOCK), BlockTable()
    table.adopt(tables, CachedBlock(7, 5))
    assert (table.slots.tolist(), table.num_free, table.num_partial) == ([*range(112, 117)], 0, 1)
    table.stage(tables, 2, [4])
    table.commit(2, [4])
    table.stage(tables, 15, [2])
    assert slots_of_rows(tables, table.row) == [[*range(112, 117), *range(64, 80), 32]]


def test_block_tables_grow_in_both_directions():
    tables, rows = BlockTables(1000 * BLOCK), 200
    held = [BlockTable() for _ in range(rows)]
    for number, table in enumerate(held):
        for block in range(number % 40 + 1):
            table.stage(tables, BLOCK, [number + block])
            table.commit(BLOCK, [number + block])
    for number, table in enumerate(held):
        assert table.slots.tolist() == [
            slot for block in table.blocks for slot in range(block * BLOCK, (block + 1) * BLOCK)
        ]
        assert len(table.blocks) == number % 40 + 1
