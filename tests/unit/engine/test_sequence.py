"""What is fed when, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from parallelmind.config import RopeConfig
from parallelmind.engine.sequence import ScheduledTokens, SequenceState
from parallelmind.layout import Tokens

MAIN = [1, 2]
BRANCHES = [[11, 12, 13, 14], [21], [31, 32, 33]]
COLUMNAR = RopeConfig(visibility="columnar", positions="flat", branch_stride=10)
FREE = RopeConfig(visibility="isolated", positions="time", branch_stride=10)
AMPLE = 100
BOTH = pytest.mark.parametrize("config", [COLUMNAR, FREE], ids=["columns", "free"])


def start(config: RopeConfig, main: list[int] = MAIN) -> SequenceState:
    return SequenceState(Tokens.of(main, BRANCHES), config)


def say(state: SequenceState, feed: ScheduledTokens) -> None:
    """Every branch that was sampled says 100 times its own number, plus how many tokens it has."""
    state.accept(feed.sampled, 100 * (feed.sampled + 1) + state.lengths[feed.sampled])


def talk(state: SequenceState, room: int = AMPLE) -> ScheduledTokens:
    feed = state.feed(room)
    say(state, feed)
    return feed


def ids(feed: ScheduledTokens) -> list[int]:
    return feed.ids.tolist()


def test_columns_are_read_up_to_the_first_word_decoded():
    feed = start(COLUMNAR).feed(AMPLE)
    assert ids(feed) == [1, 2, 11, 21, 31]
    assert feed.time.tolist() == [0, 1, 2, 2, 2]
    assert feed.branch.tolist() == [0, 0, 10, 20, 30]
    assert feed.position.tolist() == [0, 1, 2, 3, 4]
    assert (feed.rows.tolist(), feed.sampled.tolist()) == ([3], [1])


def test_longer_prompts_are_fed_in_their_columns():
    state = start(COLUMNAR)
    talk(state)
    fed = []
    for _ in range(3):
        feed = talk(state)
        fed.append((ids(feed), feed.sampled.tolist(), set(feed.time.tolist()), feed.position.tolist()))
    assert fed == [
        ([12, 201, 32], [1], {3}, [5, 6, 7]),
        ([13, 202, 33], [1, 2], {4}, [8, 9, 10]),
        ([14, 203, 303], [0, 1, 2], {5}, [11, 12, 13]),
    ]


def test_the_last_token_of_an_ended_branch_is_still_seen_by_the_others():
    state = start(COLUMNAR)
    talk(state)
    state.finish(1, "stop")
    assert [ids(talk(state, room=1)) for _ in range(3)] == [[12, 201, 32], [13, 33], [14, 303]]


def test_columns_without_a_new_word_are_read_together():
    state = start(COLUMNAR)
    talk(state)
    state.finish(1, "stop")
    feed = talk(state)
    assert ids(feed) == [12, 201, 32, 13, 33]
    assert feed.sampled.tolist() == [2]


def test_right_aligned_prompts_end_together():
    state = start(COLUMNAR.model_copy(update={"align_to": "right"}))
    feed = talk(state)
    assert len(feed.ids) == 2 + 4 + 1 + 3
    assert feed.sampled.tolist() == [0, 1, 2]
    assert set(state.feed(AMPLE).time.tolist()) == {6}


def test_free_order_reads_everything_at_once_and_keeps_own_times():
    state = start(FREE, main=[])
    feed = talk(state)
    assert ids(feed) == [11, 12, 13, 14, 21, 31, 32, 33]
    assert feed.branch.tolist() == [0] * 4 + [10] + [20] * 3
    assert (feed.rows.tolist(), feed.sampled.tolist()) == ([3, 4, 7], [0, 1, 2])
    step = state.feed(AMPLE)
    assert (ids(step), step.time.tolist(), step.position.tolist()) == ([104, 201, 303], [4, 1, 3], [4, 1, 3])


def test_prompts_in_free_order_fill_the_room_while_others_talk():
    state = start(FREE)
    fed = [(ids(feed), feed.sampled.tolist()) for feed in (talk(state, room) for room in (1, 4, 2, 2, 0))]
    assert fed == [
        ([1], []),
        ([2, 11, 12, 13], []),
        ([14, 21], [0, 1]),
        ([104, 201, 31, 32], [0, 1]),
        ([105, 202], [0, 1]),
    ]
    assert (state.waiting, state.prompts_fed) == (1, 9)


def test_columns_are_fed_whole_and_as_many_as_there_is_room_for():
    state = start(COLUMNAR.model_copy(update={"align_to": "right"}), main=[1, 2, 3])
    fed = [ids(talk(state, room)) for room in (2, 3, 0, 4, 4)]
    assert fed == [[1, 2], [3, 11], [12, 31], [13, 32], [14, 21, 33]]


def test_main_that_is_in_the_cache_is_skipped_and_counted():
    for config in (COLUMNAR, FREE):
        whole, rest = start(config), start(config)
        rest.skip_main(1)
        everything, feed = whole.feed(AMPLE), rest.feed(AMPLE)
        assert ids(feed) == ids(everything)[1:]
        assert feed.position.tolist() == everything.position.tolist()[1:]
        assert feed.time.tolist() == everything.time.tolist()[1:]


def test_an_ended_branch_is_not_fed_where_nobody_sees_it():
    state = start(FREE)
    talk(state)
    state.finish(0, "length")
    assert state.feed(AMPLE).sampled.tolist() == [1, 2]
    assert state.finish_reasons == ["length", None, None]
    state.finish(1, "stop")
    state.finish(2, "stop")
    assert state.done


def test_a_late_branch_begins_in_the_next_column():
    state = start(COLUMNAR)
    talk(state)
    assert state.join([41, 42]) == 3
    feeds = [talk(state) for _ in range(2)]
    assert [ids(feed) for feed in feeds] == [[12, 201, 32, 41], [13, 202, 33, 42]]
    assert feeds[1].sampled.tolist() == [1, 2, 3]
    assert feeds[0].time.tolist() == [3] * 4


@pytest.mark.parametrize(("align_to", "first"), [("left", 2), ("right", 4)])
def test_a_late_branch_in_free_order_stands_where_it_would_have_stood(align_to, first):
    state = start(FREE.model_copy(update={"align_to": align_to}))
    talk(state)
    state.join([41, 42])
    feed = talk(state)
    assert feed.time[feed.sequence == 4].tolist() == [first, first + 1]
    assert feed.sampled.tolist() == [0, 1, 2, 3]


@BOTH
def test_who_reads_all_comes_after_all_that_was_said(config):
    state = start(config)
    for _ in range(4):
        talk(state)
    for branch in range(3):
        state.finish(branch, "cancelled")
    end = int((state.starts + state.lengths).max())
    assert state.join([51, 52], reads_all=True) == 3
    feed = talk(state)
    assert feed.sampled.tolist() == [3]
    assert feed.time[feed.sequence == 4].tolist() == [end, end + 1]
    assert state.fed.tolist() == [*state.lengths[:3], 2], (
        "the last tokens of the others have been fed as well"
    )


@BOTH
@pytest.mark.parametrize("room", [1, 3, AMPLE])
def test_what_was_fed_is_the_final_layout(config, room):
    """Columns come in the physical order of the final layout; in free order only the coordinates must
    agree.
    """
    state, feeds = start(config), []
    for turn in range(30):  # more than the id buffer began with
        feeds.append(talk(state, room))
        if turn == 4:
            state.join([41, 42, 43])
        if turn == 8:
            state.finish(0, "cancelled")
    layout = state.final_layout()
    fed, final = (
        np.stack(
            [
                np.concatenate([getattr(part, field) for part in parts])
                for field in ("time", "sequence", "ids", "position")
            ]
        )
        for parts in (feeds, [layout])
    )
    if config is FREE:
        assert set(map(tuple, fed.T.tolist())) <= set(map(tuple, final.T.tolist()))
        assert len({(time, sequence) for time, sequence, *_ in fed.T.tolist()}) == fed.shape[1]
    else:
        np.testing.assert_array_equal(fed, final[:, : fed.shape[1]])


def test_history_is_the_branch_alone():
    state = start(COLUMNAR)
    talk(state)
    assert state.history(0).tolist() == [11, 12, 13, 14]
    assert state.history(1).tolist() == [21, 201]
    assert state.generated(1).tolist() == [201]
