"""Allocation, reuse and eviction of cache blocks, by example and at random."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from parallelmind.engine.block_manager import BLOCK, BlockManager, BlockTable, blocks_for, prefix_keys

MAIN = np.arange(3 * BLOCK + 5)


def keys(count: int, adapter_version: str = "base") -> list[bytes]:
    return prefix_keys(MAIN, adapter_version)[:count]


def cached(blocks: BlockManager, count: int) -> list[int]:
    """Allocate and cache the first blocks of MAIN."""
    allocated = blocks.allocate(count) or []
    for key, block in zip(keys(count), allocated, strict=True):
        blocks.cache_block(key, block)
    return allocated


def test_tokens_take_whole_blocks():
    assert [blocks_for(tokens) for tokens in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]


def test_a_key_depends_on_all_tokens_up_to_its_end_and_on_the_adapter():
    assert len(keys(9)) == 3
    changed = MAIN.copy()
    changed[BLOCK] += 1
    assert prefix_keys(changed, "base")[0] == keys(1)[0]
    assert not set(prefix_keys(changed, "base")[1:]) & set(keys(3))
    assert not set(keys(3, "adapter")) & set(keys(3))
    assert prefix_keys(MAIN[: BLOCK - 1], "base") == []


def test_allocation_fails_as_a_whole_if_too_few_blocks_are_available():
    blocks = BlockManager(4)
    assert blocks.allocate(5) is None
    assert blocks.allocate(3) == [0, 1, 2]
    assert (blocks.num_available, blocks.num_allocated) == (1, 3)
    assert blocks.allocate(2) is None
    assert blocks.allocate(0) == []


def test_adjacent_blocks_are_preferred():
    blocks = BlockManager(8)
    everything = blocks.allocate(8) or []
    blocks.free([everything[at] for at in (0, 2, 4, 5, 6)])
    assert blocks.allocate(3) == [4, 5, 6]
    assert blocks.allocate(2) == [0, 2]


def test_a_cached_block_is_allocated_until_its_last_reader_frees_it():
    blocks = BlockManager(4)
    first = cached(blocks, 2)
    assert blocks.match_prefix(keys(3)) == first
    blocks.free(first)
    assert blocks.num_allocated == 2
    blocks.free(first)
    assert blocks.num_allocated == 0
    assert blocks.match_prefix(keys(3)) == first, "no other allocation has needed the blocks"
    assert blocks.num_allocated == 2


def test_a_match_ends_where_the_mains_differ():
    blocks = BlockManager(4)
    own = cached(blocks, 3)
    other = MAIN.copy()
    other[2 * BLOCK] += 1
    assert blocks.match_prefix(prefix_keys(other, "base")) == own[:2]
    assert blocks.match_prefix(keys(3, "another version")) == []


def test_the_longest_idle_block_is_evicted_first_and_the_end_of_a_main_before_its_beginning():
    blocks = BlockManager(4)
    old = blocks.allocate(1) or []
    blocks.cache_block(b"old", old[0])
    blocks.free(old)
    blocks.free(cached(blocks, 3))
    blocks.free(blocks.match_prefix([b"old"]))  # used again: now the youngest
    blocks.allocate(2)
    assert len(blocks.match_prefix(keys(3))) == 1
    assert blocks.match_prefix([b"old"]) == old


def test_blocks_with_readers_are_never_evicted():
    blocks = BlockManager(3)
    own = cached(blocks, 2)
    assert blocks.allocate(2) is None
    assert blocks.allocate(1) is not None
    assert blocks.match_prefix(keys(2)) == own


def test_a_main_computed_twice_is_cached_once():
    blocks = BlockManager(4)
    first, second = cached(blocks, 1), cached(blocks, 1)
    assert blocks.match_prefix(keys(1)) == first
    blocks.free(second)
    blocks.free(first)
    blocks.free(first)
    assert blocks.num_available == 4


@settings(max_examples=60, derandomize=True)
@given(st.integers(0, 2**32))
def test_no_block_is_allocated_twice_or_lost(seed: int) -> None:
    """Samples with one of three mains and blocks of their own come and go at random."""
    rng, manager = random.Random(seed), BlockManager(12)
    samples: list[list[int]] = []  # blocks of each
    mains = [prefix_keys(MAIN + 100 * main, "base") for main in range(3)]
    for _ in range(80):
        if samples and rng.random() < 0.45:
            manager.free(samples.pop(rng.randrange(len(samples))))
        else:
            main_keys = rng.choice(mains)[: rng.randrange(4)]
            matched = manager.match_prefix(main_keys)
            own = manager.allocate(len(main_keys) - len(matched) + rng.randrange(3))
            if own is None:
                manager.free(matched)
                continue
            assert not {block for blocks in samples for block in blocks} & set(own)
            samples.append(matched + own)
            for index in range(len(matched), len(main_keys)):
                manager.cache_block(main_keys[index], samples[-1][index])
        assert manager.num_allocated == len({block for blocks in samples for block in blocks})
        assert 0 <= manager.num_available <= manager.num_blocks
    for blocks in samples:
        manager.free(blocks)
    assert len(manager.allocate(12) or []) == 12


def test_a_block_table_fills_its_blocks_in_order():
    table = BlockTable([3, 1])
    first = table.append(np.arange(3), np.zeros(3, np.int64))
    second = table.append(np.arange(3, 20), np.ones(17, np.int64))
    expected = [*range(3 * BLOCK, 4 * BLOCK), *range(BLOCK, BLOCK + 4)]
    assert [*first.tolist(), *second.tolist()] == table.slots.tolist() == expected
    assert table.time.tolist() == list(range(20))
    assert table.segment.tolist() == [0] * 3 + [1] * 17


def test_trim_removes_blocks_without_tokens_and_release_removes_all():
    table = BlockTable([0, 1, 2, 3])
    table.append(np.arange(BLOCK + 1), np.zeros(BLOCK + 1, np.int64))
    assert table.trim(3 * BLOCK) == [3]
    assert table.trim(0) == [2]
    table.extend([7])
    assert table.append(np.arange(BLOCK), np.zeros(BLOCK, np.int64)).tolist()[-1] == 7 * BLOCK
    assert table.release() == [0, 1, 7]
    assert (table.length, table.slots.tolist()) == (0, [])
