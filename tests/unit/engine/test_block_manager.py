"""Who holds which block, by hand and at random."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from parallelmind.engine.block_manager import BLOCK, BlockManager, BlockTable, blocks_for, prefix_keys

MAIN = np.arange(3 * BLOCK + 5)


def keys(count: int, version: str = "base") -> list[bytes]:
    return prefix_keys(MAIN, version)[:count]


def shared(blocks: BlockManager, count: int) -> list[int]:
    """The first blocks of MAIN, computed by a reader of its own."""
    taken = blocks.allocate(count) or []
    for key, block in zip(keys(count), taken, strict=True):
        blocks.cache_block(key, block)
    return taken


def test_a_part_of_a_block_takes_a_whole_one():
    assert [blocks_for(tokens) for tokens in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]


def test_a_key_stands_for_everything_before_its_end_and_for_what_computes_it():
    assert len(keys(9)) == 3
    changed = MAIN.copy()
    changed[BLOCK] += 1
    assert prefix_keys(changed, "base")[0] == keys(1)[0]
    assert not set(prefix_keys(changed, "base")[1:]) & set(keys(3))
    assert not set(keys(3, "adapter")) & set(keys(3))
    assert prefix_keys(MAIN[: BLOCK - 1], "base") == []


def test_too_few_blocks_are_none_at_all():
    blocks = BlockManager(4)
    assert blocks.allocate(5) is None
    assert blocks.allocate(3) == [0, 1, 2]
    assert (blocks.num_available, blocks.num_allocated) == (1, 3)
    assert blocks.allocate(2) is None
    assert blocks.allocate(0) == []


def test_neighbours_are_given_where_there_are_any():
    blocks = BlockManager(8)
    everything = blocks.allocate(8) or []
    blocks.free([everything[at] for at in (0, 2, 4, 5, 6)])
    assert blocks.allocate(3) == [4, 5, 6]
    assert blocks.allocate(2) == [0, 2]


def test_a_shared_block_is_held_until_its_last_reader_has_gone():
    blocks = BlockManager(4)
    first = shared(blocks, 2)
    assert blocks.match_prefix(keys(3)) == first
    blocks.free(first)
    assert blocks.num_allocated == 2
    blocks.free(first)
    assert blocks.num_allocated == 0
    assert blocks.match_prefix(keys(3)) == first, "nobody has needed the room"
    assert blocks.num_allocated == 2


def test_what_is_found_ends_where_the_mains_part():
    blocks = BlockManager(4)
    own = shared(blocks, 3)
    other = MAIN.copy()
    other[2 * BLOCK] += 1
    assert blocks.match_prefix(prefix_keys(other, "base")) == own[:2]
    assert blocks.match_prefix(keys(3, "another version")) == []


def test_the_longest_idle_block_goes_first_and_the_end_of_a_main_before_its_beginning():
    blocks = BlockManager(4)
    old = blocks.allocate(1) or []
    blocks.cache_block(b"old", old[0])
    blocks.free(old)
    blocks.free(shared(blocks, 3))
    blocks.free(blocks.match_prefix([b"old"]))  # used again: now the youngest
    blocks.allocate(2)
    assert len(blocks.match_prefix(keys(3))) == 1
    assert blocks.match_prefix([b"old"]) == old


def test_what_is_in_use_is_never_evicted():
    blocks = BlockManager(3)
    own = shared(blocks, 2)
    assert blocks.allocate(2) is None
    assert blocks.allocate(1) is not None
    assert blocks.match_prefix(keys(2)) == own


def test_a_main_computed_twice_is_shared_once():
    blocks = BlockManager(4)
    first, second = shared(blocks, 1), shared(blocks, 1)
    assert blocks.match_prefix(keys(1)) == first
    blocks.free(second)
    blocks.free(first)
    blocks.free(first)
    assert blocks.num_available == 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_no_block_is_ever_given_twice_or_lost(number: int) -> None:
    """Readers of a few mains and holders of their own come and go at random."""
    chance, blocks, held = random.Random(number), BlockManager(12), []
    mains = [prefix_keys(MAIN + 100 * main, "base") for main in range(3)]
    for _ in range(80):
        if held and chance.random() < 0.45:
            blocks.free(held.pop(chance.randrange(len(held))))
        else:
            wanted = chance.choice(mains)[: chance.randrange(4)]
            found = blocks.match_prefix(wanted)
            own = blocks.allocate(len(wanted) - len(found) + chance.randrange(3))
            if own is None:
                blocks.free(found)
                continue
            unshared = {block for chain in held for block in chain} & set(own)
            assert not unshared
            held.append(found + own)
            for place in range(len(found), len(wanted)):
                blocks.cache_block(wanted[place], held[-1][place])
        assert blocks.num_allocated == len({block for chain in held for block in chain})
        assert 0 <= blocks.num_available <= blocks.num_blocks
    for chain in held:
        blocks.free(chain)
    assert len(blocks.allocate(12) or []) == 12


def test_a_stream_fills_its_blocks_in_order():
    stream = BlockTable([3, 1])
    first = stream.append(np.arange(3), np.zeros(3, np.int64))
    second = stream.append(np.arange(3, 20), np.ones(17, np.int64))
    expected = [*range(3 * BLOCK, 4 * BLOCK), *range(BLOCK, BLOCK + 4)]
    assert [*first.tolist(), *second.tolist()] == stream.slots.tolist() == expected
    assert stream.time.tolist() == list(range(20))
    assert stream.sequence.tolist() == [0] * 3 + [1] * 17


def test_a_stream_gives_up_what_it_will_not_fill_and_keeps_what_it_has_filled():
    stream = BlockTable([0, 1, 2, 3])
    stream.append(np.arange(BLOCK + 1), np.zeros(BLOCK + 1, np.int64))
    assert stream.trim(3 * BLOCK) == [3]
    assert stream.trim(0) == [2]
    stream.extend([7])
    assert stream.append(np.arange(BLOCK), np.zeros(BLOCK, np.int64)).tolist()[-1] == 7 * BLOCK
    assert stream.release() == [0, 1, 7]
    assert (stream.length, stream.slots.tolist()) == (0, [])
