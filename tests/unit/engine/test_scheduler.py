"""Admission, preemption, the tokens of each step, and the release of cache blocks."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from unittest.mock import ANY

import grouping
import numpy as np
import pytest
from grouping import ReduceSpec, has_started_reduce, sequence_group
from hypothesis import given, settings
from hypothesis import strategies as st

from parallelmind.config import RopeConfig
from parallelmind.engine.block_manager import BLOCK, BlockDraft
from parallelmind.engine.decode_batch import DecodeBatch
from parallelmind.engine.output import FinishReason
from parallelmind.engine.planner import prefill_shares
from parallelmind.engine.scheduler import EngineConfig, Scheduler
from parallelmind.engine.sequence import BranchState, ScheduledTokens
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.engine.step_plan import Plan, ScheduledGroup
from parallelmind.errors import UserError
from parallelmind.tree import MAIN

COLUMNS, FREE = RopeConfig(visibility="columnar"), RopeConfig(visibility="isolated", rope_2d_ratio=0)
BOTH = pytest.mark.parametrize("config", [COLUMNS, FREE], ids=["columns", "free"])
_ids, _tokens = itertools.count(), itertools.count(1000)


def make_scheduler(
    blocks: int, max_prefill_tokens: int = 1000, max_branches: int = 16, **limits: float
) -> Scheduler:
    config = {"prefill_share": 1, **limits}
    return Scheduler(EngineConfig(blocks * BLOCK, max_prefill_tokens, max_branches, **config))  # type: ignore[arg-type]


def submit(
    scheduler: Scheduler,
    config: RopeConfig,
    num_main: int,
    prompts: Sequence[int],
    max_new_tokens: int = 1,
    reduce: ReduceSpec | None = None,
) -> SequenceGroup:
    """Submit a sample of these lengths. All mains begin alike; all prompts differ."""
    texts = [[next(_tokens) for _ in range(length)] for length in prompts]
    group = sequence_group(range(num_main), texts, config, max_new_tokens, reduce)
    group.id = next(_ids)
    scheduler.submit(group)
    return group


def add_branch(
    scheduler: Scheduler, group: SequenceGroup, num_prompt: int, max_new_tokens: int
) -> BranchState:
    first = len(group.segments)
    branch = grouping.add_branch(
        group, [next(_tokens) for _ in range(num_prompt)], max_new_tokens=max_new_tokens
    )
    try:
        scheduler.check_size(group)
    except UserError:
        group.remove_from(first)
        raise
    return branch


def finish(scheduler: Scheduler, group: SequenceGroup, branch: BranchState, reason: FinishReason) -> None:
    scheduler.finish_branch(group, branch, reason)
    group.start_ready()


def step(scheduler: Scheduler) -> Plan:
    """Do what an engine does around its forward pass; branches finish by length alone."""
    plan = scheduler.schedule()
    scheduler.begin(plan)
    scheduler.commit(plan.forward, scheduler.filled(plan.forward))
    for item in scheduled(plan):
        for index in item.tokens.sampled_branches.tolist():
            branch = item.group.branches[index]
            branch.append_token(next(_tokens))
            if len(branch.generated) == branch.params.max_new_tokens:
                finish(scheduler, item.group, branch, "length")
    return plan


def scheduled(plan: Plan) -> list[ScheduledGroup]:
    """What the plan computes of each sample, in the order of their age."""
    return sorted(plan.forward.each(), key=lambda item: item.group.id)


def step_until_preempted(scheduler: Scheduler) -> None:
    for _ in range(100):
        if not scheduler.num_preemptions:
            step(scheduler)
    assert scheduler.num_preemptions == 1


def num_tokens(plan: Plan) -> list[int]:
    return [len(item.tokens.ids) for item in scheduled(plan)]


def plain(value: Any) -> Any:
    """A plan as comparable values."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (Plan, ScheduledTokens)):
        return [plain(getattr(value, name)) for name in value.__slots__]
    if isinstance(value, DecodeBatch):
        return value.branches
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value.digest() if hasattr(value, "digest") else value


def state(scheduler: Scheduler) -> Any:
    manager = scheduler.block_manager
    segments = [
        (
            [*segment.token_ids],
            segment.num_computed,
            segment.num_prefill,
            [*segment.table.blocks],
            segment.table.length,
            segment.path and (segment.path.length, segment.path.digest()),
        )
        for group in [*scheduler.running, *scheduler.waiting]
        for segment in group.segments
    ]
    queues = [group.id for group in scheduler.running], [group.id for group in scheduler.waiting]
    blocks = [*manager._available], [*manager._holders], {**manager._block_by_key}
    return segments, queues, blocks, scheduler.num_preemptions


@BOTH
def test_planning_changes_nothing_and_gives_the_same_plan_again(config):
    rng, scheduler = random.Random(0), make_scheduler(blocks=8, max_prefill_tokens=20)
    kinds = Counter[str]()
    for _ in range(60):
        if rng.random() < 0.3:
            submit(scheduler, config, rng.choice([0, 20, 40]), [rng.randint(1, 20)], rng.randint(1, 40))
        before = state(scheduler)
        first, second = scheduler.schedule(), scheduler.schedule()
        assert plain(first) == plain(second)
        assert state(scheduler) == before
        kinds.update(name for name in ("preempted", "admitted", "adopted") if getattr(first, name))
        step(scheduler)
    assert set(kinds) == {"preempted", "admitted", "adopted"}


@BOTH
def test_a_sample_that_could_never_fit_is_refused(config):
    scheduler = make_scheduler(blocks=3, max_branches=4)
    with pytest.raises(UserError, match=r"branches: need up to 64 tokens of cache, but the cache holds 48"):
        submit(scheduler, config, BLOCK, [BLOCK, BLOCK - 2], max_new_tokens=2)
    with pytest.raises(UserError, match="branches: 5 given, 4 allowed"):
        submit(scheduler, config, 0, [1] * 5)
    with pytest.raises(UserError, match="branches: 5 given, 4 allowed"):
        submit(scheduler, config, 0, [1] * 4, reduce=ReduceSpec(1, 1))
    assert not scheduler.waiting


@BOTH
def test_blocks_are_allocated_as_they_are_needed(config):
    """Answers may be long, and most of them are short: samples wait when the cache is full, not before."""
    scheduler = make_scheduler(blocks=260, max_prefill_tokens=10_000)
    groups = [submit(scheduler, config, 0, [20], max_new_tokens=4096) for _ in range(200)]
    step(scheduler)
    assert len(scheduler.running) == 130
    assert scheduler.block_manager.num_allocated == 260
    assert scheduler.waiting == groups[130:]


def test_blocks_are_free_as_soon_as_a_branch_or_a_sample_finishes():
    scheduler = make_scheduler(blocks=9)
    group = submit(scheduler, FREE, BLOCK, [BLOCK + 1, 5], max_new_tokens=BLOCK)
    step(scheduler)
    assert scheduler.block_manager.num_allocated == 1 + 2 + 1
    finish(scheduler, group, group.branches[0], "stop")
    assert scheduler.block_manager.num_allocated == 1 + 1
    finish(scheduler, group, group.branches[1], "stop")
    assert scheduler.block_manager.num_allocated == 0
    assert not scheduler.running


def test_blocks_that_the_reduce_branch_will_read_are_kept():
    scheduler = make_scheduler(blocks=9)
    group = submit(scheduler, FREE, 0, [BLOCK + 1, 5], max_new_tokens=BLOCK, reduce=ReduceSpec(3, 2))
    step(scheduler)
    finish(scheduler, group, group.branches[0], "stop")
    assert scheduler.block_manager.num_allocated == 2 + 1
    finish(scheduler, group, group.branches[1], "stop")
    assert group.running_branches == [group.branches[2]]
    assert has_started_reduce(group)
    step(scheduler)
    assert scheduler.block_manager.num_allocated == 2 + 1 + 1
    step(scheduler)
    assert scheduler.block_manager.num_allocated == 0


def test_a_branch_cancelled_before_admission_gets_no_blocks():
    scheduler = make_scheduler(blocks=9)
    group = submit(scheduler, FREE, 0, [BLOCK, 5], max_new_tokens=BLOCK)
    finish(scheduler, group, group.branches[0], "cancelled")
    step(scheduler)
    assert scheduler.block_manager.num_allocated == 1
    finish(scheduler, group, group.branches[1], "cancelled")
    assert scheduler.block_manager.num_allocated == 0


def test_an_aborted_sample_leaves_the_waiting_queue():
    scheduler = make_scheduler(blocks=2)
    first, second, third = (submit(scheduler, FREE, 0, [20], max_new_tokens=2) for _ in range(3))
    step(scheduler)
    scheduler.abort(second)
    assert scheduler.waiting == [third]
    scheduler.abort(first)
    assert scheduler.block_manager.num_allocated == 0
    assert [item.group for item in scheduled(step(scheduler))] == [third]


@BOTH
def test_the_newest_sample_is_preempted_and_continues_with_its_tokens(config):
    scheduler = make_scheduler(blocks=4)
    old, new = (submit(scheduler, config, 0, [BLOCK + 10], max_new_tokens=20) for _ in range(2))
    step_until_preempted(scheduler)
    assert (scheduler.running, scheduler.waiting) == ([old], [new])
    assert new.segments[MAIN].table.blocks == []
    generated = list(new.branches[0].generated)
    assert generated
    run_to_end(scheduler)
    assert new.branches[0].generated[: len(generated)] == generated
    assert [len(group.branches[0].generated) for group in (old, new)] == [20, 20]
    assert scheduler.block_manager.num_allocated == 0


def test_a_preempted_sample_finds_its_blocks_again():
    scheduler = make_scheduler(blocks=6)
    old, _ = (submit(scheduler, FREE, 0, [2 * BLOCK], max_new_tokens=40) for _ in range(2))
    step_until_preempted(scheduler)
    scheduler.abort(old)
    assert num_tokens(step(scheduler)) == [BLOCK + 1], "the other sample has taken the last block"


# The order of admission


def test_a_sample_that_fits_is_admitted_past_one_that_does_not():
    scheduler = make_scheduler(blocks=6)
    first, large, small = (
        submit(scheduler, FREE, 0, [BLOCK * count], max_new_tokens=2) for count in (2, 4, 1)
    )
    step(scheduler)
    assert (scheduler.running, scheduler.waiting) == ([first, small], [large])


@settings(max_examples=30, derandomize=True)
@given(seed=st.integers(0, 2**32), patience=st.integers(0, 20))
def test_no_sample_starves_while_others_keep_arriving(seed: int, patience: int) -> None:
    """A sample that needs the whole cache waits for at most `max_overtaken_steps`, and for the samples that
    have been admitted by then."""
    rng, num_blocks = random.Random(seed), 8
    scheduler = make_scheduler(num_blocks, max_prefill_tokens=20, max_overtaken_steps=patience)
    for _ in range(rng.randrange(30)):
        arrive(scheduler, rng)
        step(scheduler)
    large = submit(scheduler, FREE, 0, [num_blocks * BLOCK - 4], max_new_tokens=3)
    older = [*scheduler.running, *scheduler.waiting[:-1]]
    ahead = [*older]
    for steps in itertools.count():
        if large.is_admitted:
            break
        arrive(scheduler, rng)
        step(scheduler)
        if steps < patience:
            ahead += [group for group in scheduler.running if group.id > large.id and group not in ahead]
        assert steps <= patience + sum(segment.max_tokens for group in ahead for segment in group.segments)
    assert all(group in ahead or group.id < large.id for group in scheduler.running if group is not large)
    while large.is_running:
        arrive(scheduler, rng)
        step(scheduler)
    assert not large.num_preemptions, "it is older than all that are admitted beside it"


def arrive(scheduler: Scheduler, rng: random.Random) -> None:
    submit(scheduler, FREE, rng.choice([0, 20]), [rng.randint(1, 30)], rng.randint(1, 9))


def test_a_sample_that_the_cache_cannot_hold_alone_is_found_out():
    scheduler = make_scheduler(blocks=4)
    group = submit(scheduler, FREE, 0, [BLOCK], max_new_tokens=40)
    step(scheduler)
    scheduler.block_manager.hold(BlockDraft(scheduler.block_manager).allocate(3) or [])  # of no sample
    for _ in range(3 * BLOCK):
        if (plan := scheduler.schedule()).stuck:
            break
        step(scheduler)
    assert plan.stuck == (group,)


# Reuse of cached blocks


@BOTH
def test_the_prefix_of_a_main_is_reused_until_its_blocks_are_evicted(config):
    scheduler = make_scheduler(blocks=5)
    submit(scheduler, config, 2 * BLOCK, [1])
    step(scheduler)
    assert scheduler.block_manager.num_allocated == 0
    submit(scheduler, config, BLOCK, [1])
    assert num_tokens(step(scheduler)) == [1]
    assert scheduler.num_reused_tokens == BLOCK
    submit(scheduler, config, 0, [4 * BLOCK - 1])  # takes the end of the main
    step(scheduler)
    submit(scheduler, config, 2 * BLOCK, [1])
    step(scheduler)
    assert scheduler.num_reused_tokens == 2 * BLOCK


def sample(scheduler: Scheduler, main: Sequence[int], prompts: Sequence[Sequence[int]]) -> SequenceGroup:
    group = sequence_group(main, prompts, FREE, max_new_tokens=30)
    group.id = next(_ids)
    scheduler.submit(group)
    return group


def run_to_end(scheduler: Scheduler) -> int:
    """Step until no sample is left; returns how many tokens were computed."""
    computed = 0
    for _ in range(3000):
        if not scheduler.running and not scheduler.waiting:
            return computed
        computed += sum(num_tokens(step(scheduler)))
    raise AssertionError("samples are left")


COMMON, OWN = list(range(100)), [[500 + branch] * 8 for branch in range(10)]


@pytest.mark.parametrize("as_branches", [True, False])
def test_prompts_with_a_common_beginning_compute_it_once(as_branches):
    scheduler = make_scheduler(blocks=200)
    prompts = [COMMON + own for own in OWN]
    samples = [prompts] if as_branches else [[prompt] for prompt in prompts]
    for branches in samples:
        sample(scheduler, [], branches)
    run_to_end(scheduler)
    assert scheduler.num_reused_tokens == 9 * 96


def test_a_turn_that_a_branch_decoded_is_found_by_the_next_one():
    scheduler = make_scheduler(blocks=200)
    first = sample(scheduler, COMMON[:37], [COMMON[40:43]])
    run_to_end(scheduler)
    turn = [*first.main.tolist(), *first.branches[0].token_ids]
    sample(scheduler, [*turn, 9, 9], [[8]])
    assert num_tokens(step(scheduler)) == [1 + 2 + 1], "the last decoded token was not computed before"


def test_branches_that_differ_in_what_their_keys_depend_on_share_nothing():
    scheduler = make_scheduler(blocks=200)
    config = RopeConfig(visibility="isolated", rope_2d_ratio=0.5)
    group = sequence_group([], [COMMON] * 3, config, max_new_tokens=1)
    scheduler.submit(group)
    run_to_end(scheduler)
    assert scheduler.num_reused_tokens == 0, "they have different branch coordinates"
    right = RopeConfig(visibility="isolated", rope_2d_ratio=0, align_to="right")
    scheduler.submit(sequence_group([], [COMMON + [1] * 20, [*COMMON, 2]], right, max_new_tokens=1))
    run_to_end(scheduler)
    assert scheduler.num_reused_tokens == 100, "the first one; the second begins at another time"


def test_a_prompt_that_is_cached_as_a_whole_computes_its_last_token():
    scheduler = make_scheduler(blocks=20)
    for expected in (2 * BLOCK, 1):
        sample(scheduler, [], [COMMON[: 2 * BLOCK]])
        assert num_tokens(step(scheduler)) == [expected]
        run_to_end(scheduler)


# Prompts


@pytest.mark.parametrize(
    ("waiting", "shares"),
    [
        ([0, 0], [0, 0]),
        ([90, 0], [10, 0]),
        ([90, 90, 3, 2], [5, 0, 3, 2]),
        ([2, 90, 90], [2, 8, 0]),
        ([0, 90, 4], [0, 6, 4]),
    ],
)
def test_half_of_the_budget_is_for_the_oldest_prompt_and_the_rest_for_the_shortest(waiting, shares):
    assert prefill_shares(waiting, 10) == shares


def test_a_short_prompt_does_not_wait_behind_a_long_one():
    scheduler = make_scheduler(blocks=100, max_prefill_tokens=10)
    long = submit(scheduler, FREE, 0, [1000])
    step(scheduler)
    short = submit(scheduler, FREE, 0, [4])
    plan = step(scheduler)
    assert [(item.group, len(item.tokens.ids)) for item in scheduled(plan)] == [(long, 6), (short, 4)]
    assert not short.is_running


def test_prompts_take_a_share_of_a_step_while_branches_decode():
    scheduler = make_scheduler(blocks=100, max_prefill_tokens=20, prefill_share=0.3)
    decoding = submit(scheduler, FREE, 0, [3], max_new_tokens=50)
    step(scheduler)
    long = submit(scheduler, FREE, 0, [200])
    for _ in range(5):
        plan = step(scheduler)
        assert [(item.group, len(item.tokens.ids)) for item in scheduled(plan)] == [(decoding, 1), (long, 6)]
    scheduler.abort(decoding)
    assert num_tokens(step(scheduler)) == [20]


@pytest.mark.parametrize(
    "limit",
    [
        {"cache_tokens": -1},
        {"cache_tokens": "4096"},
        {"max_prefill_tokens": 0},
        {"max_branches": 1.5},
        {"max_overtaken_steps": True},
    ],
)
def test_a_limit_that_is_no_whole_number_is_refused_by_name(limit):
    (name,) = limit
    with pytest.raises(UserError, match=rf"^{name}=.*: give a whole number from [01]$"):
        EngineConfig(**{"cache_tokens": 1024, **limit})


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UserError, match=r"prefill_share=.*: give a number above 0 and up to 1"):
        EngineConfig(1024, prefill_share=share)


def test_the_load_tells_of_preemptions_waiting_and_reuse():
    scheduler = make_scheduler(blocks=6)
    for _ in range(3):
        submit(scheduler, FREE, 0, [2 * BLOCK], max_new_tokens=40)
    step_until_preempted(scheduler)
    stats = scheduler.stats()
    assert (stats.preemptions, stats.waiting_samples) == (1, 2)
    assert max(stats.waiting_s) > 0
    run_to_end(scheduler)
    for _ in range(2):
        submit(scheduler, FREE, 2 * BLOCK, [2])
        run_to_end(scheduler)
    stats = scheduler.stats()
    assert stats.waiting_s == ()
    assert stats.reused_share_by_kind == {
        "main": 0.5,
        "document": 0.0,
        "branch": 0.0,
        "preempted": ANY,
    }
    assert 0 < stats.reused_share < stats.reused_share_by_kind["preempted"] < 1


# Branches that join


@BOTH
def test_a_branch_that_does_not_fit_now_waits(config):
    scheduler = make_scheduler(blocks=8, max_branches=3)
    group = submit(scheduler, config, 0, [4], max_new_tokens=12)
    other = submit(scheduler, config, 0, [7 * BLOCK - 1], max_new_tokens=1)
    with pytest.raises(UserError, match="but the cache holds"):
        add_branch(scheduler, group, 10, 10 * BLOCK)
    assert add_branch(scheduler, group, 10, 10).index == 1
    add_branch(scheduler, group, 1, 1)
    with pytest.raises(UserError, match="branches: 4 given, 3 allowed"):
        add_branch(scheduler, group, 1, 1)
    run_to_end(scheduler)
    assert [branch.num_tokens for branch in group.branches] == [16, 20, 2]
    assert not other.is_running
    assert scheduler.block_manager.num_allocated == 0


@BOTH
def test_a_waiting_sample_does_not_exceed_the_cache(config):
    scheduler = make_scheduler(blocks=4)
    group = submit(scheduler, config, 0, [BLOCK], max_new_tokens=BLOCK)
    with pytest.raises(UserError, match="but the cache holds"):
        add_branch(scheduler, group, BLOCK, 2 * BLOCK)
    add_branch(scheduler, group, BLOCK, BLOCK)
    run_to_end(scheduler)


def test_branches_can_be_added_without_end_while_others_finish():
    scheduler = make_scheduler(blocks=2, max_branches=30)
    group = submit(scheduler, FREE, 0, [1], max_new_tokens=9)
    for _ in range(12):
        step(scheduler)
        branch = add_branch(scheduler, group, 1, 9)
        finish(scheduler, group, group.branches[branch.index - 1], "stop")
        assert scheduler.block_manager.num_allocated <= 1


def test_a_column_branch_that_joins_during_a_pass_starts_after_its_columns():
    scheduler = make_scheduler(blocks=20)
    group = submit(scheduler, COLUMNS, 3, [4], max_new_tokens=9)
    plan = scheduler.schedule()
    scheduler.begin(plan)
    assert add_branch(scheduler, group, 2, 2).start_time == 7
    scheduler.commit(plan.forward, [])


@BOTH
def test_a_branch_that_joins_a_preempted_sample_starts_where_it_would_have_started(config):
    scheduler = make_scheduler(blocks=6)
    _, new = (submit(scheduler, config, 0, [2 * BLOCK], max_new_tokens=40) for _ in range(2))
    step_until_preempted(scheduler)
    start = 0 if config is FREE else new.branches[0].num_tokens - 1
    assert add_branch(scheduler, new, 1, 1).start_time == start
    run_to_end(scheduler)


# Faults


@BOTH
def test_a_plan_that_is_dropped_before_it_begins_leaves_no_trace(config):
    scheduler = make_scheduler(blocks=6)
    submit(scheduler, config, 20, [20], max_new_tokens=30)
    for _ in range(10):
        step(scheduler)
    before = state(scheduler)
    scheduler.schedule()
    assert state(scheduler) == before


@BOTH
def test_a_sample_whose_pass_fails_is_aborted_and_what_it_overwrote_is_not_found(config):
    scheduler = make_scheduler(blocks=4)
    submit(scheduler, config, 3 * BLOCK, [1])
    step(scheduler)
    failed = submit(scheduler, config, 0, [4 * BLOCK - 1])
    scheduler.begin(scheduler.schedule())
    scheduler.abort(failed, "error")
    assert scheduler.block_manager.num_allocated == 0
    again = submit(scheduler, config, 3 * BLOCK, [1])
    plan = step(scheduler)
    assert num_tokens(plan) == [3 * BLOCK + 1]
    assert not plan.adopted
    assert not again.is_running


# At random


def test_prompts_of_cancelled_branches_count_if_the_reduce_branch_reads_them():
    scheduler = make_scheduler(blocks=20, max_prefill_tokens=10)
    group = submit(scheduler, FREE, 0, [30, 1], max_new_tokens=1, reduce=ReduceSpec(1, 1))
    submit(scheduler, FREE, 0, [30], max_new_tokens=1)
    step(scheduler)
    for branch in group.branches:
        if branch.is_running:
            finish(scheduler, group, branch, "cancelled")
    for _ in range(3):
        assert sum(num_tokens(step(scheduler))) <= 10


@BOTH
@settings(max_examples=40, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_the_cache_is_never_overcommitted_and_every_sample_finishes(config: RopeConfig, seed: int) -> None:
    """Samples are submitted, extended, cut and aborted at random."""
    rng = random.Random(seed)
    scheduler = make_scheduler(blocks=12, max_prefill_tokens=9, max_branches=6)
    groups: list[SequenceGroup] = []
    for _ in range(60):
        unfinished = [group for group in groups if group.is_running]
        group = rng.choice(unfinished) if unfinished else None
        match rng.randrange(8):
            case 0 | 1:
                reduce = rng.choice([None, ReduceSpec(rng.randint(1, 20), 3)])
                prompts = [rng.randint(1, 20) for _ in range(rng.randint(1, 3))]
                num_main = rng.choice([0, 20, 40])
                groups.append(submit(scheduler, config, num_main, prompts, rng.randint(1, 9), reduce))
            case 2 if group and not has_started_reduce(group):
                with suppress(UserError):
                    add_branch(scheduler, group, rng.randint(1, 20), rng.randint(1, 9))
            case 3 if group:
                finish(scheduler, group, rng.choice(group.running_branches), "cancelled")
            case 4 if group and rng.random() < 0.3:
                scheduler.abort(group)
            case _:
                check_step(scheduler)
    for _ in range(300):
        if scheduler.running or scheduler.waiting:
            check_step(scheduler)
    run_to_end(scheduler)
    assert scheduler.block_manager.num_allocated == 0


def check_step(scheduler: Scheduler) -> None:
    """A step stays within its prefill budget, but never splits a column; no block is written by two."""
    waiting = {group: num_waiting(group) for group in [*scheduler.running, *scheduler.waiting]}
    plan = step(scheduler)
    prefill = 0
    for item in scheduled(plan):
        assert len(item.tokens.ids)
        one_column = item.group.config is COLUMNS and len(set(item.tokens.time.tolist())) == 1
        counts = np.minimum(item.tokens.counts, waiting[item.group][: len(item.tokens.counts)]).sum()
        prefill += 0 if one_column else int(counts)
    assert prefill <= 9
    assert bool(scheduled(plan)) == bool(waiting)
    slots = np.concatenate([[-1], *(item.slots for item in scheduled(plan))])
    assert len(set(slots.tolist())) == len(slots)
    held = Counter(
        block for group in scheduler.running for segment in group.segments for block in segment.table.blocks
    )
    assert held == Counter(dict(enumerate(scheduler.block_manager._holders)))


def num_waiting(group: SequenceGroup) -> np.ndarray:
    return np.array([segment.num_waiting_prefill for segment in group.segments])
