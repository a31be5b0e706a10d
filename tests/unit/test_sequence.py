"""What is fed when, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from parallelmind.config import RopeConfig
from parallelmind.decoding.sequence import Decoding, Feed
from parallelmind.layout import Tokens

MAIN = [1, 2]
BRANCHES = [[11, 12, 13, 14], [21], [31, 32, 33]]
COLUMNAR = RopeConfig(visibility="columnar", positions="flat", branch_stride=10)
FREE = RopeConfig(visibility="isolated", positions="time", branch_stride=10)


def start(config: RopeConfig, main: list[int] = MAIN) -> Decoding:
    return Decoding(Tokens.of(main, BRANCHES), config)


def say(state: Decoding, feed: Feed) -> None:
    """Every branch that was sampled says 100 times its own number, plus how many tokens it has."""
    state.accept(feed.sampled, 100 * (feed.sampled + 1) + state.lengths[feed.sampled])


def ids(feed: Feed) -> list[int]:
    return feed.ids.tolist()


def test_columns_are_read_up_to_the_first_word_decoded():
    feed = start(COLUMNAR).feed(100)
    assert ids(feed) == [1, 2, 11, 21, 31]
    assert feed.time.tolist() == [0, 1, 2, 2, 2]
    assert feed.branch.tolist() == [0, 0, 10, 20, 30]
    assert feed.position.tolist() == [0, 1, 2, 3, 4]
    assert (feed.rows.tolist(), feed.sampled.tolist()) == ([3], [1])


def test_longer_prompts_are_fed_in_their_columns():
    state = start(COLUMNAR)
    say(state, state.feed(100))
    fed = []
    for _ in range(3):
        feed = state.feed(100)
        say(state, feed)
        fed.append((ids(feed), feed.sampled.tolist(), set(feed.time.tolist()), feed.position.tolist()))
    assert fed == [
        ([12, 201, 32], [1], {3}, [5, 6, 7]),
        ([13, 202, 33], [1, 2], {4}, [8, 9, 10]),
        ([14, 203, 303], [0, 1, 2], {5}, [11, 12, 13]),
    ]


def test_the_last_token_of_an_ended_branch_is_still_seen_by_the_others():
    state = start(COLUMNAR)
    say(state, state.feed(100))
    state.finish(1, "stop")
    assert ids(state.feed(100)) == [12, 201, 32, 13, 33]


def test_right_aligned_prompts_end_together():
    state = start(COLUMNAR.model_copy(update={"align_to": "right"}))
    feed = state.feed(100)
    assert len(feed.ids) == 2 + 4 + 1 + 3
    assert feed.sampled.tolist() == [0, 1, 2]
    say(state, feed)
    assert set(state.feed(100).time.tolist()) == {6}


def test_free_order_reads_everything_at_once_and_keeps_own_times():
    state = start(FREE, main=[])
    feed = state.feed(100)
    assert ids(feed) == [11, 12, 13, 14, 21, 31, 32, 33]
    assert feed.branch.tolist() == [0] * 4 + [10] + [20] * 3
    assert (feed.rows.tolist(), feed.sampled.tolist()) == ([3, 4, 7], [0, 1, 2])
    say(state, feed)
    step = state.feed(100)
    assert (ids(step), step.time.tolist(), step.position.tolist()) == ([104, 201, 303], [4, 1, 3], [4, 1, 3])


def test_an_ended_branch_is_not_fed_where_nobody_sees_it():
    state = start(FREE)
    say(state, state.feed(100))
    state.finish(0, "length")
    assert state.feed(100).sampled.tolist() == [1, 2]
    assert state.finish_reasons == ["length", None, None]
    state.finish(1, "stop")
    state.finish(2, "stop")
    assert state.done


@pytest.mark.parametrize("config", [COLUMNAR, FREE])
def test_what_was_fed_is_the_final_layout(config):
    """Columns come in the physical order of the final layout; in free order only the coordinates must agree."""
    state = start(config)
    feeds = [state.feed(100)]
    say(state, feeds[0])
    for _ in range(20):  # more than the id buffer began with
        feeds.append(state.feed(100))
        say(state, feeds[-1])
    layout = state.final_layout()
    fed, final = (
        np.stack([np.concatenate([getattr(part, field) for part in parts]) for field in ("time", "sequence", "ids", "position")])
        for parts in (feeds, [layout])
    )
    if config is FREE:
        fed, final = (table[:, np.lexsort((table[1], table[0]))] for table in (fed, final))
        known = set(map(tuple, final.T.tolist()))
        assert set(map(tuple, fed.T.tolist())) <= known
    else:
        np.testing.assert_array_equal(fed, final[:, : fed.shape[1]])


def test_history_is_the_branch_alone():
    state = start(COLUMNAR)
    say(state, state.feed(100))
    assert [state.history(branch).tolist() for branch in (0, 1)] == [[11, 12, 13, 14], [21, 201]]
    assert state.generated(1).tolist() == [201]
