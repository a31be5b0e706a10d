"""Which tokens of a sample each step computes, on small samples."""

from __future__ import annotations

import numpy as np
import pytest
from grouping import ReduceSpec, add_branch, sequence_group

from parallelmind.config import RopeConfig
from parallelmind.engine.sequence import ScheduledTokens
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.engine.token_scheduler import schedule_tokens

MAIN = [1, 2]
BRANCHES = [[11, 12, 13, 14], [21], [31, 32, 33]]
COLUMNAR = RopeConfig(visibility="columnar", positions="flat", branch_stride=10)
FREE = RopeConfig(visibility="isolated", positions="time", branch_stride=10)
AMPLE = 100
BOTH = pytest.mark.parametrize("config", [COLUMNAR, FREE], ids=["columns", "free"])


def start(config: RopeConfig, main: list[int] = MAIN) -> SequenceGroup:
    return sequence_group(main, BRANCHES, config, reduce=ReduceSpec(2, 1))


def compute(group: SequenceGroup, tokens: ScheduledTokens) -> None:
    """Count scheduled tokens as computed, as `Scheduler.commit` does."""
    for segment, count in zip(group.segments, tokens.counts.tolist(), strict=True):
        segment.num_computed += count
    group.next_column = group.frontier = tokens.next_column


def append_sampled(group: SequenceGroup, tokens: ScheduledTokens) -> None:
    """Give each sampled branch the token 100 times its number, plus how many tokens it has."""
    for index in tokens.sampled_branches.tolist():
        branch = group.branches[index]
        branch.append_token(100 * (index + 1) + branch.num_tokens)


def step(group: SequenceGroup, budget: int = AMPLE) -> ScheduledTokens:
    tokens = schedule_tokens(group, budget)
    compute(group, tokens)
    append_sampled(group, tokens)
    return tokens


def ids(tokens: ScheduledTokens) -> list[int]:
    return tokens.ids.tolist()


def test_the_first_step_computes_the_columns_up_to_the_first_decoded_token():
    tokens = schedule_tokens(start(COLUMNAR), AMPLE)
    assert ids(tokens) == [1, 2, 11, 21, 31]
    assert tokens.time.tolist() == [0, 1, 2, 2, 2]
    assert tokens.branch.tolist() == [0, 0, 10, 20, 30]
    assert tokens.position.tolist() == [0, 1, 2, 3, 4]
    assert (tokens.logits_indices.tolist(), tokens.sampled_branches.tolist()) == ([3], [1])


def test_longer_prompts_are_computed_in_their_columns():
    group = start(COLUMNAR)
    step(group)
    computed = []
    for _ in range(3):
        tokens = step(group)
        columns = set(tokens.time.tolist())
        computed.append((ids(tokens), tokens.sampled_branches.tolist(), columns, tokens.position.tolist()))
    assert computed == [
        ([12, 201, 32], [1], {3}, [5, 6, 7]),
        ([13, 202, 33], [1, 2], {4}, [8, 9, 10]),
        ([14, 203, 303], [0, 1, 2], {5}, [11, 12, 13]),
    ]


def test_the_last_token_of_a_finished_branch_is_computed_for_its_siblings():
    group = start(COLUMNAR)
    step(group)
    group.finish(group.branches[1], "stop")
    assert [ids(step(group, budget=1)) for _ in range(3)] == [[12, 201, 32], [13, 33], [14, 303]]


def test_columns_without_a_new_token_are_computed_together():
    group = start(COLUMNAR)
    step(group)
    group.finish(group.branches[1], "stop")
    tokens = step(group)
    assert ids(tokens) == [12, 201, 32, 13, 33]
    assert tokens.sampled_branches.tolist() == [2]


def test_right_aligned_prompts_end_together():
    group = start(COLUMNAR.model_copy(update={"align_to": "right"}))
    tokens = step(group)
    assert len(tokens.ids) == 2 + 4 + 1 + 3
    assert tokens.sampled_branches.tolist() == [0, 1, 2]
    assert set(schedule_tokens(group, AMPLE).time.tolist()) == {6}


def test_free_order_computes_all_prompts_at_once_and_keeps_their_times():
    group = start(FREE, main=[])
    tokens = step(group)
    assert ids(tokens) == [11, 12, 13, 14, 21, 31, 32, 33]
    assert tokens.branch.tolist() == [0] * 4 + [10] + [20] * 3
    assert (tokens.logits_indices.tolist(), tokens.sampled_branches.tolist()) == ([3, 4, 7], [0, 1, 2])
    tokens = schedule_tokens(group, AMPLE)
    assert ids(tokens) == [104, 201, 303]
    assert tokens.time.tolist() == tokens.position.tolist() == [4, 1, 3]


def test_prompts_in_free_order_fill_the_budget_while_other_branches_decode():
    group = start(FREE)
    steps = [step(group, budget) for budget in (1, 4, 2, 2, 0)]
    assert [(ids(tokens), tokens.sampled_branches.tolist()) for tokens in steps] == [
        ([1], []),
        ([2, 11, 12, 13], []),
        ([14, 21], [0, 1]),
        ([104, 201, 31, 32], [0, 1]),
        ([105, 202], [0, 1]),
    ]
    assert group.num_waiting_prefill == 1


def test_whole_columns_are_computed_within_the_budget():
    group = start(COLUMNAR.model_copy(update={"align_to": "right"}), main=[1, 2, 3])
    computed = [ids(step(group, budget)) for budget in (2, 3, 0, 4, 4)]
    assert computed == [[1, 2], [3, 11], [12, 31], [13, 32], [14, 21, 33]]


def test_cached_tokens_of_main_are_not_computed_but_counted():
    for config in (COLUMNAR, FREE):
        whole, cached = start(config), start(config)
        cached.segments[0].num_computed = cached.next_column = 1
        everything, rest = schedule_tokens(whole, AMPLE), schedule_tokens(cached, AMPLE)
        assert ids(rest) == ids(everything)[1:]
        assert rest.position.tolist() == everything.position.tolist()[1:]
        assert rest.time.tolist() == everything.time.tolist()[1:]


def test_a_finished_branch_is_not_computed_where_no_branch_sees_it():
    group = start(FREE)
    step(group)
    group.finish(group.branches[0], "length")
    assert schedule_tokens(group, AMPLE).sampled_branches.tolist() == [1, 2]
    assert [branch.index for branch in group.running_branches] == [1, 2]
    for branch in group.running_branches:
        group.finish(branch, "stop")
    assert not group.running_branches


def test_a_late_branch_starts_in_the_next_column():
    group = start(COLUMNAR)
    step(group)
    assert add_branch(group, [41, 42]).index == 4
    steps = [step(group) for _ in range(2)]
    assert [ids(tokens) for tokens in steps] == [[12, 201, 32, 41], [13, 202, 33, 42]]
    assert steps[1].sampled_branches.tolist() == [1, 2, 4]
    assert steps[0].time.tolist() == [3] * 4


@pytest.mark.parametrize(("align_to", "first"), [("left", 2), ("right", 4)])
def test_a_late_branch_in_free_order_starts_as_if_it_had_been_submitted(align_to, first):
    group = start(FREE.model_copy(update={"align_to": align_to}))
    step(group)
    add_branch(group, [41, 42])
    tokens = step(group)
    assert tokens.time[tokens.segment == 5].tolist() == [first, first + 1]
    assert tokens.sampled_branches.tolist() == [0, 1, 2, 4]


def test_a_late_branch_is_aligned_with_the_branches_beside_it_alone():
    """A reduce and a branch that forks do not end where the other prompts do."""
    right, reduce = FREE.model_copy(update={"align_to": "right"}), ReduceSpec(30, 1)
    late = sequence_group(MAIN, [[21], [31] * 9], right, reduce=reduce)
    group = sequence_group(MAIN, [[21], [31] * 9, [41, 42]], right, reduce=reduce)
    late.finish(late.branches[1], "forked")
    add_branch(late, [51], parent=2)
    assert add_branch(late, [41, 42]).start_time == len(MAIN)
    assert group.branches[2].start_time == len(MAIN) + 7


def test_branches_that_wait_are_aligned_with_one_that_joins_them():
    """As in a sample that is moved to another engine, which is given all of them at once."""
    group = sequence_group(MAIN, [[11]], FREE.model_copy(update={"align_to": "right"}))
    waiting = [add_branch(group, prompt, parent=1) for prompt in ([21], [22, 23, 24], [31] * 10)]
    group.finish(group.branches[0], "forked")
    group.start_ready()
    assert {branch.end_time for branch in waiting} == {len(MAIN) + 1 + 10}


@BOTH
def test_the_reduce_branch_starts_after_all_decoded_tokens(config):
    group = start(config)
    for _ in range(4):
        step(group)
    for branch in group.running_branches:
        group.finish(branch, "cancelled")
    end = max(branch.start_time + branch.num_tokens for branch in group.branches)
    assert [branch.index for branch in group.start_ready()] == [3]
    tokens = step(group)
    assert tokens.sampled_branches.tolist() == [3]
    assert tokens.time[tokens.segment == 4].tolist() == [end, end + 1]
    num_tokens = [branch.num_tokens for branch in group.branches[:3]]
    assert [branch.num_computed for branch in group.branches] == [*num_tokens, 2], (
        "the last tokens of the other branches are computed too"
    )


@BOTH
@pytest.mark.parametrize("budget", [1, 3, AMPLE])
def test_computed_tokens_are_those_of_the_final_layout(config, budget):
    """Column order computes them in the order of the layout, free order with the same coordinates."""
    group, steps = start(config), []
    for step_index in range(30):
        steps.append(step(group, budget))
        if step_index == 4:
            add_branch(group, [41, 42, 43])
        if step_index == 8:
            group.finish(group.branches[0], "cancelled")
    fields = ("time", "segment", "ids", "position")
    computed = np.stack([np.concatenate([getattr(tokens, field) for tokens in steps]) for field in fields])
    final = np.stack([getattr(group.final_layout(), field) for field in fields])
    if config is FREE:
        assert set(map(tuple, computed.T.tolist())) <= set(map(tuple, final.T.tolist()))
        assert len({(time, segment) for time, segment, *_ in computed.T.tolist()}) == computed.shape[1]
    else:
        np.testing.assert_array_equal(computed, final[:, : computed.shape[1]])


def test_a_branch_holds_its_own_tokens_alone():
    group = start(COLUMNAR)
    step(group)
    assert group.branches[0].token_ids == [11, 12, 13, 14]
    assert group.branches[1].token_ids == [21, 201]
    assert group.branches[1].generated == [201]


def test_branches_without_a_seed_have_that_of_their_sample():
    group = start(FREE)
    assert {branch.seed for branch in group.branches} == {0}
    assert add_branch(group, [41], seed=7).seed == 7
