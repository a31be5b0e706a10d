"""Who is admitted, what a step reads of whom, and when blocks are free again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallelmind.config import RopeConfig
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.scheduler import EngineConfig, Scheduler
from parallelmind.engine.sequence import ScheduledTokens
from parallelmind.engine.sequence_group import Reduction, Running
from parallelmind.errors import CapacityError, UserError
from parallelmind.layout import MAIN, Tokens

COLUMNS, FREE = RopeConfig(visibility="columnar"), RopeConfig(visibility="isolated")
BOTH = pytest.mark.parametrize("config", [COLUMNS, FREE], ids=["columns", "free"])


def scheduler(blocks: int, max_prefill_tokens: int = 1000, max_branches: int = 16) -> Scheduler:
    return Scheduler(EngineConfig(blocks * BLOCK, max_prefill_tokens, max_branches))


def submit(
    at: Scheduler,
    config: RopeConfig,
    main: int,
    prompts: Sequence[int],
    most: int = 1,
    last: Reduction | None = None,
) -> Running:
    """A sample by its lengths; its main is the beginning of everybody's main."""
    tokens = Tokens.of(range(main), [[7] * length for length in prompts])
    return at.submit(tokens, config, [most] * len(prompts), "base", last)


def step(at: Scheduler) -> list[tuple[Running, ScheduledTokens]]:
    """What an engine does around its forward pass; a branch ends when it has said all that it may."""
    feeds = at.schedule()
    for entry, feed in feeds:
        entry.stored().enter(feed)
    for entry, feed in feeds:
        at.computed(entry)
        entry.decoding.accept(feed.sampled, np.ones_like(feed.sampled))
        for branch in feed.sampled.tolist():
            if len(entry.decoding.generated(branch)) == entry.most[branch]:
                at.finish(entry, branch, "length")
    return feeds


def prompt_tokens(entry: Running, feed: ScheduledTokens) -> int:
    """How much of main and prompts a feed reads."""
    begins = np.append(0, entry.decoding.starts + entry.decoding.prompt_lengths)
    return int(((feed.sequence == MAIN) | (feed.time < begins[feed.sequence])).sum())


def test_samples_are_admitted_in_order_and_nobody_overtakes():
    at = scheduler(blocks=6)
    first, large, small = (submit(at, FREE, 0, [BLOCK] * count, most=2) for count in (2, 3, 1))
    step(at)
    assert at.running == [first]
    step(at)
    step(at)
    assert at.running == [large]
    assert list(at.waiting) == [small]


@BOTH
def test_a_sample_that_could_never_fit_is_refused(config):
    at = scheduler(blocks=3, max_branches=4)
    with pytest.raises(UserError, match=r"branches: .* need 64 tokens of cache, and 48 is all there is"):
        submit(at, config, BLOCK, [BLOCK, BLOCK - 2], most=2)
    with pytest.raises(UserError, match="branches: 5 given, 4 allowed"):
        submit(at, config, 0, [1] * 5)
    with pytest.raises(UserError, match="branches: 5 given, 4 allowed"):
        submit(at, config, 0, [1] * 4, last=Reduction([1], 1))
    assert not at.waiting


def test_blocks_are_free_the_moment_a_branch_or_a_sample_ends():
    at = scheduler(blocks=9)
    entry = submit(at, FREE, BLOCK, [BLOCK, 5], most=BLOCK)
    step(at)
    assert at.blocks.held == 1 + 2 + 2
    at.finish(entry, 0, "stop")
    assert at.blocks.held == 1 + 2
    at.finish(entry, 1, "stop")
    assert at.blocks.held == 0
    assert not at.running


def test_a_column_that_will_not_be_filled_is_given_up():
    at = scheduler(blocks=9)
    entry = submit(at, COLUMNS, 0, [4, 4], most=60)
    step(at)
    assert at.blocks.held == 8
    at.finish(entry, 0, "stop")
    assert at.blocks.held == 5, "4 tokens and a new one stay, 64 may come"
    at.finish(entry, 1, "stop")
    assert at.blocks.held == 0


def test_what_somebody_is_still_to_read_is_kept():
    at = scheduler(blocks=9)
    entry = submit(at, FREE, 0, [BLOCK, 5], most=BLOCK, last=Reduction([1] * 3, 2))
    step(at)
    assert at.blocks.held == 2 + 2 + 1
    at.finish(entry, 0, "stop")
    assert at.blocks.held == 2 + 2 + 1, "16 tokens and a new one"
    assert at.finish(entry, 1, "stop") == 2
    assert at.blocks.held == 2 + 1 + 1
    step(at)
    step(at)
    assert at.blocks.held == 0


def test_a_branch_cancelled_before_its_sample_begins_is_given_nothing():
    at = scheduler(blocks=9)
    entry = submit(at, FREE, 0, [BLOCK, 5], most=BLOCK)
    at.finish(entry, 0, "cancelled")
    step(at)
    assert at.blocks.held == 2
    at.finish(entry, 1, "cancelled")
    assert at.blocks.held == 0


@BOTH
def test_the_beginning_of_a_main_is_shared_and_kept_until_somebody_needs_the_room(config):
    at = scheduler(blocks=5)
    submit(at, config, 2 * BLOCK, [1])
    step(at)
    assert at.blocks.held == 0
    submit(at, config, BLOCK, [1])
    assert [len(feed.ids) for _, feed in step(at)] == [1]
    assert (at.prompt_tokens, at.reused_tokens) == (3 * BLOCK, BLOCK)
    submit(at, config, 0, [4 * BLOCK - 1])  # takes the end of the main
    step(at)
    submit(at, config, 2 * BLOCK, [1])
    step(at)
    assert at.reused_tokens == 2 * BLOCK


def test_who_has_been_dropped_while_waiting_is_forgotten():
    at = scheduler(blocks=2)
    first, second, third = (submit(at, FREE, 0, [20], most=2) for _ in range(3))
    step(at)
    at.drop(second)
    assert list(at.waiting) == [third]
    at.drop(first)
    assert at.blocks.held == 0
    assert [entry for entry, _ in step(at)] == [third]


@BOTH
def test_a_branch_joins_where_there_is_room_now_or_ever(config):
    at = scheduler(blocks=8, max_branches=3)
    entry = submit(at, config, 0, [4], most=12)
    step(at)
    other = submit(at, config, 0, [4], most=6 * BLOCK)
    step(at)
    with pytest.raises(CapacityError, match="no room for 20 more tokens now"):
        at.join(entry, [7] * 10, 10)
    with pytest.raises(UserError, match="is all there is") as error:
        at.join(entry, [7] * 10, 10 * BLOCK)
    assert not isinstance(error.value, CapacityError)
    at.drop(other)
    assert at.join(entry, [7] * 10, 10) == 1
    at.join(entry, [7], 1)
    with pytest.raises(UserError, match="the sample has 3, as many as allowed"):
        at.join(entry, [7], 1)
    while at.running:
        step(at)
    assert entry.decoding.lengths.tolist() == [16, 20, 2]
    assert at.blocks.held == 0


@BOTH
def test_a_waiting_sample_does_not_grow_beyond_the_cache(config):
    at = scheduler(blocks=4)
    entry = submit(at, config, 0, [BLOCK], most=BLOCK)
    with pytest.raises(UserError, match="is all there is"):
        at.join(entry, [7] * BLOCK, 2 * BLOCK)
    at.join(entry, [7] * BLOCK, BLOCK)
    step(at)
    assert at.blocks.held == 4


def test_a_sample_may_be_joined_for_ever_while_its_branches_end():
    at = scheduler(blocks=2, max_branches=30)
    entry = submit(at, FREE, 0, [1], most=9)
    step(at)
    for _ in range(12):
        branch = at.join(entry, [7], 9)
        at.finish(entry, branch - 1, "stop")
    assert at.blocks.held == 1


def test_prompts_of_cancelled_branches_that_will_be_read_count_as_well():
    at = scheduler(blocks=20, max_prefill_tokens=10)
    entry = submit(at, FREE, 0, [30, 1], most=1, last=Reduction([1], 1))
    submit(at, FREE, 0, [30], most=1)
    step(at)
    at.finish(entry, 0, "cancelled")
    at.finish(entry, 1, "cancelled")
    for _ in range(3):
        assert sum(len(feed.ids) for _, feed in step(at)) <= 10


@BOTH
@settings(max_examples=40, deadline=None, derandomize=True)
@given(number=st.integers(0, 2**32))
def test_nothing_is_overcommitted_and_everybody_ends(config: RopeConfig, number: int) -> None:
    """Samples come, are joined, lose branches and leave at random; who has begun can always end."""
    chance = random.Random(number)
    at, entries = scheduler(blocks=12, max_prefill_tokens=9, max_branches=6), []
    for _ in range(60):
        going = [entry for entry in entries if not entry.decoding.done]
        entry = chance.choice(going) if going else None
        match chance.randrange(8):
            case 0 | 1:
                last = chance.choice([None, Reduction([7] * chance.randint(1, 20), 3)])
                prompts = [chance.randint(1, 20) for _ in range(chance.randint(1, 3))]
                entries.append(
                    submit(at, config, chance.choice([0, 20, 40]), prompts, chance.randint(1, 9), last)
                )
            case 2 if entry and not (config is FREE and entry.decoding.reads_all.any()):
                with suppress(UserError):
                    at.join(entry, [7] * chance.randint(1, 20), chance.randint(1, 9))
            case 3 if entry:
                at.finish(entry, int(chance.choice(np.flatnonzero(entry.decoding.live))), "cancelled")
            case 4 if entry and chance.random() < 0.3:
                at.drop(entry)
            case _:
                check(step(at))
        assert 0 <= at.blocks.held <= at.blocks.count
    while at.running or at.waiting:
        assert check(step(at))
    assert at.blocks.held == 0


def check(feeds: list[tuple[Running, ScheduledTokens]]) -> bool:
    """No more of prompts than a step has room for, except that columns are not split; whether anything was
    read.
    """
    room = 9
    for entry, feed in feeds:
        assert len(feed.ids)
        read = prompt_tokens(entry, feed)
        assert read <= max(room, 0) or (
            entry.decoding.config is COLUMNS and len(set(feed.time.tolist())) == 1
        )
        room -= read
    return bool(feeds)
