"""Admission, the tokens of each step, and the release of cache blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import pytest
from grouping import reduce_spec, sequence_group
from hypothesis import given, settings
from hypothesis import strategies as st

from parallelmind.config import RopeConfig
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.request import ReduceSpec
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.scheduler import EngineConfig, ScheduledGroup, Scheduler
from parallelmind.engine.sequence import BranchState, ScheduledTokens
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.errors import CapacityError, UserError
from parallelmind.tree import MAIN

COLUMNS, FREE = RopeConfig(visibility="columnar"), RopeConfig(visibility="isolated")
BOTH = pytest.mark.parametrize("config", [COLUMNS, FREE], ids=["columns", "free"])


def make_scheduler(blocks: int, max_prefill_tokens: int = 1000, max_branches: int = 16) -> Scheduler:
    return Scheduler(EngineConfig(blocks * BLOCK, max_prefill_tokens, max_branches))


def submit(
    scheduler: Scheduler,
    config: RopeConfig,
    num_main: int,
    prompts: Sequence[int],
    max_new_tokens: int = 1,
    reduce: ReduceSpec | None = None,
) -> SequenceGroup:
    """Submit a sample of these lengths. All mains begin alike."""
    group = sequence_group(
        range(num_main), [[7] * length for length in prompts], config, max_new_tokens, reduce
    )
    scheduler.submit(group)
    return group


def add_branch(
    scheduler: Scheduler, group: SequenceGroup, num_prompt: int, max_new_tokens: int
) -> BranchState:
    return scheduler.add_branch(group, [7] * num_prompt, SamplingParams(max_new_tokens=max_new_tokens))


def step(scheduler: Scheduler) -> list[ScheduledGroup]:
    """Do what an engine does around its forward pass; branches finish by length alone."""
    scheduled = scheduler.schedule()
    for group, tokens in scheduled:
        group.assign_slots(tokens)
    scheduler.commit(scheduled)
    for group, tokens in scheduled:
        for index in tokens.sampled_branches.tolist():
            branch = group.branches[index]
            branch.append_token(1)
            if len(branch.generated) == branch.params.max_new_tokens:
                scheduler.finish_branch(group, branch, "length")
    return scheduled


def num_prefill_tokens(group: SequenceGroup, tokens: ScheduledTokens) -> int:
    """How many scheduled tokens are of main and of prompts."""
    ends = np.array([0, *(branch.start_time + branch.num_prompt for branch in group.branches)])
    return int(((tokens.segment == MAIN) | (tokens.time < ends[tokens.segment])).sum())


def test_admission_is_first_in_first_out():
    scheduler = make_scheduler(blocks=6)
    first, large, small = (
        submit(scheduler, FREE, 0, [BLOCK] * count, max_new_tokens=2) for count in (2, 3, 1)
    )
    step(scheduler)
    assert scheduler.running == [first]
    step(scheduler)
    step(scheduler)
    assert scheduler.running == [large]
    assert list(scheduler.waiting) == [small]


@BOTH
def test_a_sample_that_could_never_fit_is_refused(config):
    scheduler = make_scheduler(blocks=3, max_branches=4)
    with pytest.raises(UserError, match=r"branches: need up to 64 tokens of cache, but the cache holds 48"):
        submit(scheduler, config, BLOCK, [BLOCK, BLOCK - 2], max_new_tokens=2)
    with pytest.raises(UserError, match="branches: 5 given, 4 allowed"):
        submit(scheduler, config, 0, [1] * 5)
    with pytest.raises(UserError, match="branches: 5 given, 4 allowed"):
        submit(scheduler, config, 0, [1] * 4, reduce=reduce_spec(1, 1))
    assert not scheduler.waiting


def test_blocks_are_free_as_soon_as_a_branch_or_a_sample_finishes():
    scheduler = make_scheduler(blocks=9)
    group = submit(scheduler, FREE, BLOCK, [BLOCK, 5], max_new_tokens=BLOCK)
    step(scheduler)
    assert scheduler.block_manager.num_allocated == 1 + 2 + 2
    scheduler.finish_branch(group, group.branches[0], "stop")
    assert scheduler.block_manager.num_allocated == 1 + 2
    scheduler.finish_branch(group, group.branches[1], "stop")
    assert scheduler.block_manager.num_allocated == 0
    assert not scheduler.running


def test_blocks_that_a_finished_branch_will_not_fill_are_free_in_column_order():
    scheduler = make_scheduler(blocks=9)
    group = submit(scheduler, COLUMNS, 0, [4, 4], max_new_tokens=60)
    step(scheduler)
    assert scheduler.block_manager.num_allocated == 8
    scheduler.finish_branch(group, group.branches[0], "stop")
    assert scheduler.block_manager.num_allocated == 5, "4 tokens and a new one stay, 64 may come"
    scheduler.finish_branch(group, group.branches[1], "stop")
    assert scheduler.block_manager.num_allocated == 0


def test_blocks_that_the_reduce_branch_will_read_are_kept():
    scheduler = make_scheduler(blocks=9)
    group = submit(scheduler, FREE, 0, [BLOCK, 5], max_new_tokens=BLOCK, reduce=reduce_spec(3, 2))
    step(scheduler)
    assert scheduler.block_manager.num_allocated == 2 + 2 + 1
    scheduler.finish_branch(group, group.branches[0], "stop")
    assert scheduler.block_manager.num_allocated == 2 + 2 + 1, "16 tokens and a new one"
    scheduler.finish_branch(group, group.branches[1], "stop")
    assert group.running_branches == [group.branches[2]]
    assert group.reduce_started
    assert scheduler.block_manager.num_allocated == 2 + 1 + 1
    step(scheduler)
    step(scheduler)
    assert scheduler.block_manager.num_allocated == 0


def test_a_branch_cancelled_before_admission_gets_no_blocks():
    scheduler = make_scheduler(blocks=9)
    group = submit(scheduler, FREE, 0, [BLOCK, 5], max_new_tokens=BLOCK)
    scheduler.finish_branch(group, group.branches[0], "cancelled")
    step(scheduler)
    assert scheduler.block_manager.num_allocated == 2
    scheduler.finish_branch(group, group.branches[1], "cancelled")
    assert scheduler.block_manager.num_allocated == 0


@BOTH
def test_the_prefix_of_a_main_is_reused_until_its_blocks_are_evicted(config):
    scheduler = make_scheduler(blocks=5)
    submit(scheduler, config, 2 * BLOCK, [1])
    step(scheduler)
    assert scheduler.block_manager.num_allocated == 0
    submit(scheduler, config, BLOCK, [1])
    assert [len(tokens.ids) for _, tokens in step(scheduler)] == [1]
    assert (scheduler.num_main_tokens, scheduler.num_reused_tokens) == (3 * BLOCK, BLOCK)
    submit(scheduler, config, 0, [4 * BLOCK - 1])  # takes the end of the main
    step(scheduler)
    submit(scheduler, config, 2 * BLOCK, [1])
    step(scheduler)
    assert scheduler.num_reused_tokens == 2 * BLOCK


def test_an_aborted_sample_leaves_the_waiting_queue():
    scheduler = make_scheduler(blocks=2)
    first, second, third = (submit(scheduler, FREE, 0, [20], max_new_tokens=2) for _ in range(3))
    step(scheduler)
    scheduler.abort(second)
    assert list(scheduler.waiting) == [third]
    scheduler.abort(first)
    assert scheduler.block_manager.num_allocated == 0
    assert [group for group, _ in step(scheduler)] == [third]


@BOTH
def test_a_branch_is_added_if_it_fits_now(config):
    scheduler = make_scheduler(blocks=8, max_branches=3)
    group = submit(scheduler, config, 0, [4], max_new_tokens=12)
    step(scheduler)
    other = submit(scheduler, config, 0, [4], max_new_tokens=6 * BLOCK)
    step(scheduler)
    with pytest.raises(CapacityError, match="no room for 20 more tokens now"):
        add_branch(scheduler, group, 10, 10)
    with pytest.raises(UserError, match="but the cache holds") as error:
        add_branch(scheduler, group, 10, 10 * BLOCK)
    assert not isinstance(error.value, CapacityError)
    scheduler.abort(other)
    assert add_branch(scheduler, group, 10, 10).index == 1
    add_branch(scheduler, group, 1, 1)
    with pytest.raises(UserError, match="the sample has 3, the maximum"):
        add_branch(scheduler, group, 1, 1)
    while scheduler.running:
        step(scheduler)
    assert [branch.num_tokens for branch in group.branches] == [16, 20, 2]
    assert scheduler.block_manager.num_allocated == 0


@BOTH
def test_a_waiting_sample_does_not_exceed_the_cache(config):
    scheduler = make_scheduler(blocks=4)
    group = submit(scheduler, config, 0, [BLOCK], max_new_tokens=BLOCK)
    with pytest.raises(UserError, match="but the cache holds"):
        add_branch(scheduler, group, BLOCK, 2 * BLOCK)
    add_branch(scheduler, group, BLOCK, BLOCK)
    step(scheduler)
    assert scheduler.block_manager.num_allocated == 4


def test_branches_can_be_added_without_end_while_others_finish():
    scheduler = make_scheduler(blocks=2, max_branches=30)
    group = submit(scheduler, FREE, 0, [1], max_new_tokens=9)
    step(scheduler)
    for _ in range(12):
        branch = add_branch(scheduler, group, 1, 9)
        scheduler.finish_branch(group, group.branches[branch.index - 1], "stop")
    assert scheduler.block_manager.num_allocated == 1


def test_prompts_of_cancelled_branches_count_if_the_reduce_branch_reads_them():
    scheduler = make_scheduler(blocks=20, max_prefill_tokens=10)
    group = submit(scheduler, FREE, 0, [30, 1], max_new_tokens=1, reduce=reduce_spec(1, 1))
    submit(scheduler, FREE, 0, [30], max_new_tokens=1)
    step(scheduler)
    scheduler.finish_branch(group, group.branches[0], "cancelled")
    scheduler.finish_branch(group, group.branches[1], "cancelled")
    for _ in range(3):
        assert sum(len(tokens.ids) for _, tokens in step(scheduler)) <= 10


@BOTH
@settings(max_examples=40, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_the_cache_is_never_overcommitted_and_every_sample_finishes(config: RopeConfig, seed: int) -> None:
    """Samples are submitted, extended, cut and aborted at random; every admitted sample can finish."""
    rng = random.Random(seed)
    scheduler = make_scheduler(blocks=12, max_prefill_tokens=9, max_branches=6)
    groups: list[SequenceGroup] = []
    for _ in range(60):
        unfinished = [group for group in groups if group.is_running]
        group = rng.choice(unfinished) if unfinished else None
        match rng.randrange(8):
            case 0 | 1:
                reduce = rng.choice([None, reduce_spec(rng.randint(1, 20), 3)])
                prompts = [rng.randint(1, 20) for _ in range(rng.randint(1, 3))]
                num_main = rng.choice([0, 20, 40])
                groups.append(submit(scheduler, config, num_main, prompts, rng.randint(1, 9), reduce))
            case 2 if group and not (config is FREE and group.reduce_started):
                with suppress(UserError):
                    add_branch(scheduler, group, rng.randint(1, 20), rng.randint(1, 9))
            case 3 if group:
                scheduler.finish_branch(group, rng.choice(group.running_branches), "cancelled")
            case 4 if group and rng.random() < 0.3:
                scheduler.abort(group)
            case _:
                check_budget(step(scheduler))
        assert 0 <= scheduler.block_manager.num_allocated <= scheduler.block_manager.num_blocks
    while scheduler.running or scheduler.waiting:
        assert check_budget(step(scheduler))
    assert scheduler.block_manager.num_allocated == 0


def check_budget(scheduled: list[ScheduledGroup]) -> bool:
    """Check that a step stays within its prefill budget, except that a column is never split.

    Returns whether the step computes any token.
    """
    budget = 9
    for group, tokens in scheduled:
        assert len(tokens.ids)
        num_prefill = num_prefill_tokens(group, tokens)
        one_column = group.config is COLUMNS and len(set(tokens.time.tolist())) == 1
        assert num_prefill <= max(budget, 0) or one_column
        budget -= num_prefill
    return bool(scheduled)
