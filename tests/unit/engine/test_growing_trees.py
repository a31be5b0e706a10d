"""Forks, reduces, joins and cancels of branches: indices, events, and what is refused in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from engines import COLUMNAR, ISOLATED, decode, run_to_end, step_interrupted, tiny_engine, tokens_by_branch
from tiny import tiny_llama, tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.data.records import MAX_DEPTH
from parallelmind.engine.engine import Engine
from parallelmind.engine.output import Event
from parallelmind.engine.request import Sample, Segment
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.errors import UserError
from parallelmind.evaluation import tiny_models as tiny

BOTH = pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
SETTINGS: dict[str, Any] = {"max_new_tokens": 3, "ignore_eos": True}
NESTED = Sample(
    [5, 6],
    [Segment([7], [[8], Segment([9], sampling={"max_new_tokens": 0})], reduce=[10]), [11, 12]],
    reduce=Segment([13], [[14]]),
)


def ends(events: list[Event]) -> dict[int, str]:
    return {event.branch: event.finish_reason for event in events if event.finish_reason}


def steps(engine: Engine, count: int) -> list[Event]:
    return [event for _ in range(count) for event in engine.step()]


@BOTH
def test_every_segment_of_a_tree_is_decoded_in_the_order_of_the_walk(config: RopeConfig) -> None:
    engine = tiny_engine(config)
    sample_id = engine.submit(NESTED, **SETTINGS)
    events = run_to_end(engine)
    assert [placed.place for placed in NESTED.walk()] == [
        "branches[0]",
        "branches[0].branches[0]",
        "branches[0].branches[1]",
        "branches[0].reduce",
        "branches[1]",
        "reduce",
        "reduce.branches[0]",
    ]
    tokens = tokens_by_branch(events)
    assert [len(tokens[sample_id, index]) for index in range(7)] == [3, 3, 0, 3, 3, 3, 3]
    assert ends(events) == dict.fromkeys(range(7), "length")
    times = {event.branch: event.pos2d[1] for event in reversed(events) if event.pos2d}  # of the first token
    assert times == {0: 3, 1: 7, 2: 6, 3: 11, 4: 4, 5: 15, 6: 19}, (
        "2, which is only read, starts with its prompt"
    )


@BOTH
def test_a_forked_branch_stops_and_its_branches_continue_its_path(config: RopeConfig) -> None:
    engine = tiny_engine(config)
    sample_id = engine.submit(Sample([5, 6], [[7], [8]]), **SETTINGS | {"max_new_tokens": 9})
    events = steps(engine, 4)
    first, second = engine.fork(
        sample_id, 0, [[20], Segment([21, 22], sampling={"max_new_tokens": 1})], **SETTINGS
    )
    assert engine.reduce(sample_id, 0, [23], **SETTINGS) == 4
    assert engine.reduce(sample_id, None, [24], **SETTINGS) == 5
    assert engine.join(sample_id, [25], branch=0, **SETTINGS) == 6
    assert (first, second) == (2, 3)
    events += run_to_end(engine)
    assert ends(events) == {0: "forked"} | dict.fromkeys(range(1, 7), "length")
    tokens = tokens_by_branch(events)
    assert [len(tokens[sample_id, index]) for index in range(7)] == [4, 9, 3, 1, 3, 3, 3]
    coordinates = {event.branch: event.pos2d[0] for event in events if event.pos2d}
    stride = config.branch_stride
    assert coordinates == {
        0: stride,
        1: 2 * stride,
        2: 3 * stride,
        3: 4 * stride,
        4: stride,
        5: 0,
        6: 7 * stride,
    }


def test_a_forked_path_is_the_path_of_one_text() -> None:
    """Isolated and without rotation by the branch, a fork changes nothing on the path."""
    config = ISOLATED.model_copy(update={"rope_2d_ratio": 0})
    engine = tiny_engine(config)
    sample_id = engine.submit(Sample([5, 6], [[7]]), **SETTINGS | {"max_new_tokens": 9})
    events = steps(engine, 4)
    engine.fork(sample_id, 0, [[20], [30]], **SETTINGS)
    tokens = tokens_by_branch(events + run_to_end(engine))
    for branch, prompt in ((1, [20]), (2, [30])):
        text = [5, 6, 7, *tokens[sample_id, 0], *prompt]
        assert decode(tiny_engine(config), Sample([], [text]), **SETTINGS) == [tokens[sample_id, branch]]


@BOTH
def test_a_cancelled_subtree_ends_with_one_event_for_each_segment(config: RopeConfig) -> None:
    engine = tiny_engine(config)
    engine.submit(NESTED, **SETTINGS)
    events = steps(engine, 2)
    engine.cancel(0, 0)
    events += run_to_end(engine)
    assert ends(events) == dict.fromkeys(range(4), "cancelled") | dict.fromkeys((4, 5, 6), "length")
    assert len([event for event in events if event.finish_reason]) == 7
    engine.submit(NESTED, **SETTINGS)
    engine.cancel(1)
    assert ends(run_to_end(engine)) == dict.fromkeys(range(7), "cancelled")
    assert engine.scheduler.block_manager.num_allocated == 0


def test_a_reduce_whose_branches_never_started_continues_its_parent() -> None:
    engine = tiny_engine()
    sample_id = engine.submit(Sample([5], [Segment([6], [[7]], reduce=[8]), [9]]), **SETTINGS)
    engine.cancel(sample_id, 1)
    events = run_to_end(engine)
    assert ends(events) == {0: "length", 1: "cancelled", 2: "length", 3: "length"}
    assert min(event.pos2d[1] for event in events if event.branch == 2 and event.pos2d) == 1 + 1 + 3 + 1


def test_what_follows_a_failed_branch_fails_with_it() -> None:
    engine = tiny_engine()
    engine.submit(NESTED, **SETTINGS)
    group = engine.samples.groups[0]
    group.branches[0].output = SimpleNamespace(matcher=None)  # type: ignore[assignment]  # does not decode
    events = run_to_end(engine)
    assert ends(events) == dict.fromkeys(range(4), "error") | dict.fromkeys((4, 5, 6), "length")
    errors = {event.branch: event.error for event in events if event.error}
    assert set(errors) == {0, 1, 2, 3}
    assert len(set(errors.values())) == 1


def test_a_late_reduce_reads_branches_whose_blocks_were_freed() -> None:
    """The blocks of an isolated branch are freed at its end; its tokens are computed again for the reduce."""
    branches = [Segment([6], sampling={"max_new_tokens": 2}), [7, 8]]
    settings = SETTINGS | {"max_new_tokens": 6}
    expected = decode(tiny_engine(), Sample([5], branches, reduce=[9]), **settings)
    engine = tiny_engine()
    sample_id = engine.submit(Sample([5], branches), **settings)
    events = steps(engine, 4)
    freed = engine.samples.groups[sample_id].branches[0]
    assert (freed.is_finished, freed.num_computed, freed.table.blocks) == (True, 0, [])
    assert engine.reduce(sample_id, None, [9], **settings) == 2
    tokens = tokens_by_branch(events + run_to_end(engine))
    assert [tokens[sample_id, index] for index in range(3)] == expected


def test_a_late_reduce_during_the_pass_in_which_a_branch_is_freed() -> None:
    branches = [[6], [7, 8]]
    engine = tiny_engine()
    sample_id = engine.submit(Sample([5], branches), **SETTINGS | {"max_new_tokens": 6})
    events = steps(engine, 2)

    def act() -> None:
        engine.cancel(sample_id, 0)
        engine.reduce(sample_id, None, [9], **SETTINGS)

    group = engine.samples.groups[sample_id]
    events += step_interrupted(engine, act)
    assert group.branches[0].num_computed == 0
    events += run_to_end(engine)
    assert ends(events) == {0: "cancelled", 1: "length", 2: "length"}
    tokens = tokens_by_branch(events)
    given = [[6, *tokens[sample_id, 0]], [7, 8, *tokens[sample_id, 1]]]
    read_only = [{"max_new_tokens": 0}] * 2
    again = decode(tiny_engine(), Sample([5], given, reduce=[9]), per_branch=read_only, **SETTINGS)
    assert again[2] == tokens[sample_id, 2]


def test_a_refused_fork_lets_the_branch_run_on() -> None:
    engine = tiny_engine()
    sample_id = engine.submit(Sample([5], [[6]]), **SETTINGS)
    events = steps(engine, 1)
    with pytest.raises(UserError, match="exceed the model's 4096 positions"):
        engine.fork(sample_id, 0, [[7] * 4096])
    assert ends(events + run_to_end(engine)) == {0: "length"}


def chain(depth: int) -> Segment:
    segment = Segment([5])
    for _ in range(depth - 1):
        segment = Segment([5], [segment])
    return segment


def test_a_tree_of_the_greatest_depth_is_decoded() -> None:
    engine = tiny_engine(cache_tokens=4096)
    engine.submit(Sample([5], [chain(MAX_DEPTH)]), max_new_tokens=1, ignore_eos=True)
    assert ends(run_to_end(engine)) == dict.fromkeys(range(MAX_DEPTH), "length")
    with pytest.raises(UserError, match="branches: are nested more than 64 deep"):
        engine.submit(Sample([5], [chain(MAX_DEPTH + 1)]))
    sample_id = engine.submit(Sample([5], [chain(MAX_DEPTH)]), max_new_tokens=1)
    with pytest.raises(UserError, match="branches: are nested 65 deep, 64 allowed"):
        engine.join(sample_id, [6], branch=MAX_DEPTH - 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda engine, number: engine.fork(number, 1, [[5]]),
            "branch=1: has ended; fork a branch that runs",
        ),
        (lambda engine, number: engine.fork(number, 3, [[5]]), "branch=3: has not started; fork"),
        (
            lambda engine, number: engine.fork(number, 9, [[5]]),
            "branch=9: unknown; the sample has branches 0 to 4",
        ),
        (lambda engine, number: engine.fork(number, None, [[5]]), "branch=None: main does not decode"),
        (lambda engine, number: engine.fork(number, 0, []), r"branches=\[\]: a sample needs at least one"),
        (lambda engine, number: engine.fork(number, 0, "ab"), "branches='ab': give a list of texts"),
        (lambda engine, number: engine.fork(number, 0, [[5], ""]), r"branches\[1\]: holds no token"),
        (lambda engine, number: engine.fork(number, 0, [[999]]), "token id 999"),
        (lambda engine, number: engine.fork(number, 0, [[5]], top_q=1), "top_q=1: unknown"),
        (lambda engine, number: engine.fork(number, 0, [[5]] * 4), "branches: 9 given, 8 allowed"),
        (
            lambda engine, number: engine.join(number, [5], branch=1),
            "branch=1: has ended; join one that runs",
        ),
        (lambda engine, number: engine.reduce(number, None, [5]), "main: has a reduce"),
        (
            lambda engine, number: engine.reduce(number, 3, [5]),
            "branch=3: has no branches to reduce; fork it",
        ),
        (lambda engine, number: engine.reduce(number, 0, ""), r"branches\[0\]: holds no token"),
        (
            lambda engine, number: engine.reduce(number, 0, [5], max_new_tokens=0),
            "max_new_tokens=0: the reduce branch decodes nothing",
        ),
        (lambda engine, number: engine.reduce(9, 0, [5]), "sample 9: unknown or finished"),
    ],
)
def test_a_bad_change_of_a_tree_is_refused_in_one_line(call: Any, message: str) -> None:
    engine = tiny_engine(max_branches=8)
    sample = Sample([5], [[6], Segment([7], sampling={"max_new_tokens": 1}), Segment([8], [[9]])], reduce=[9])
    sample_id = engine.submit(sample, **SETTINGS | {"max_new_tokens": 20})
    engine.step()
    engine.step()
    before = [
        (branch.finish_reason, branch.num_tokens) for branch in engine.samples.groups[sample_id].branches
    ]
    with pytest.raises(UserError, match=message) as error:
        call(engine, sample_id)
    assert "\n" not in str(error.value)
    assert before == [
        (branch.finish_reason, branch.num_tokens) for branch in engine.samples.groups[sample_id].branches
    ]
    run_to_end(engine)


def test_no_reduce_is_added_when_the_branches_have_ended() -> None:
    engine = tiny_engine()
    branches = [Segment([6], [[7]], sampling={"max_new_tokens": 1}), [8]]
    sample_id = engine.submit(Sample([5], branches), max_new_tokens=9, ignore_eos=True)
    steps(engine, 2)
    engine.cancel(sample_id, 1)
    with pytest.raises(UserError, match="branch=0: its branches have ended; give the reduce while"):
        engine.reduce(sample_id, 0, [9])
    with pytest.raises(UserError, match="branch=0: has ended; join one that runs"):
        engine.join(sample_id, [9], branch=0)


def test_a_sample_with_two_reduces_is_refused() -> None:
    with pytest.raises(UserError, match=r"reduce=\[9\]: the sample has a reduce; give one of them"):
        tiny_engine().submit(Sample([5], [[6]], reduce=[7]), reduce=[9])
    for fork in (Sample, Segment):
        with pytest.raises(UserError, match=r"reduce=\[7\]: has no branches to read"):
            fork([5], reduce=[7])


def test_a_tree_needs_a_patched_model_that_holds_branches_in_one_sequence() -> None:
    unpatched = Engine(tiny_llama(), tiny_tokenizer(), EngineConfig(512))
    with pytest.raises(UserError, match="branches: 7 given, but the model is not patched"):
        unpatched.submit(NESTED)
    recurrent = Engine(tiny.tiny_model("mamba2"), tiny.tiny_tokenizer(), EngineConfig(512))
    message = "branches: the model .* has no branches and no reduce; give main and branches alone"
    with pytest.raises(UserError, match=message):
        recurrent.submit(NESTED)
    sample_id = recurrent.submit(Sample([5], [[6], [7]]), **SETTINGS)
    events = steps(recurrent, 1)
    for call in (
        lambda: recurrent.fork(sample_id, 0, [[8]]),
        lambda: recurrent.reduce(sample_id, None, [8]),
        lambda: recurrent.join(sample_id, [8], branch=0),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert ends(events + run_to_end(recurrent)) == {0: "length", 1: "length"}


def test_a_repetition_penalty_counts_the_tokens_of_the_path() -> None:
    engine = tiny_engine()
    engine.submit(Sample([5, 6], [Segment([7], [[8]], sampling={"max_new_tokens": 0}), [9]]), **SETTINGS)
    group = engine.samples.groups[0]
    assert group.path_tokens(group.branches[1]) == [5, 6, 7, 8]


def test_a_join_that_is_accepted_fits_whatever_the_cache_holds() -> None:
    """Before, blocks that the sample used in part took the room of the branch, and ended both."""

    def decode_joined(engine: Engine) -> dict[tuple[int, int], list[int]]:
        sample_id = engine.submit(Sample(main, [[60] * 4]), max_new_tokens=44, ignore_eos=True)
        events = engine.step()
        engine.join(sample_id, [70] * 16, max_new_tokens=32, ignore_eos=True)
        events += run_to_end(engine)
        assert {event.finish_reason for event in events} == {None, "length"}
        return {(0, branch): tokens for (_, branch), tokens in tokens_by_branch(events).items()}

    main = [*range(5, 29)]
    cold, warm = (tiny_engine(ISOLATED, cache_tokens=128) for _ in range(2))
    decode(warm, Sample(main[:20], [[50]]), max_new_tokens=1)
    assert decode_joined(warm) == decode_joined(cold)
    assert warm.scheduler.num_preemptions == 1
