"""Forks in a text, however it is split into pieces; everything else is text."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallelmind.engine.fork_parser import ForkParser, ForkSyntax
from parallelmind.fork_markers import ForkMarkers

MARKERS = ForkMarkers("<f>", "<|>", "</f>", "<j>")
MAX_TITLES = 3
PIECES = st.lists(
    st.sampled_from([*MARKERS, "<", "f", ">", "/", "|", "a", "b c", " ", "\n", "é"]), max_size=14
)
TITLE = "((?!<f>|<\\|>|</f>|<j>).)*"
FORK = re.compile(f"<f>(?P<titles>{TITLE}(<\\|>{TITLE})*)</f>", re.DOTALL)


def parser(markers: ForkMarkers = MARKERS) -> ForkParser:
    return ForkParser(ForkSyntax(markers, {}, (1,)), MAX_TITLES)


def first_fork(text: str) -> tuple[int, int, tuple[str, ...]] | None:
    """Where the first fork begins and ends, and its titles, found in the whole text."""
    for start in range(len(text)):
        if (match := FORK.match(text, start)) is not None:
            titles = tuple(match["titles"].split("<|>"))
            if len(titles) <= MAX_TITLES and all(title.strip() for title in titles):
                return start, match.end(), titles
    return None


@given(PIECES)
def test_a_text_of_refused_forks_is_shown_whole(pieces: list[str]) -> None:
    reader, shown = parser(), ""
    for piece in pieces:
        shown += reader.push(piece)
        if reader.titles:
            shown += reader.refuse()
    assert shown + reader.refuse() == "".join(pieces)


@given(PIECES)
def test_the_first_fork_is_found_with_the_piece_that_completes_it(pieces: list[str]) -> None:
    text, reader, shown = "".join(pieces), parser(), ""
    expected = first_fork(text)
    for number, piece in enumerate(pieces, 1):
        shown += reader.push(piece)
        read = "".join(pieces[:number])
        found = first_fork(read)
        assert reader.titles == (() if found is None else found[2])
        if found is not None:
            assert found == expected
            assert (shown, reader.accept()) == (read[: found[0]], read[found[1] :])
            return
        assert read.startswith(shown), "nothing that may be a fork is shown"
        assert first_fork(read + "a</f>") is None or len(shown) <= first_fork(read + "a</f>")[0]  # type: ignore[index]
    assert expected is None


@pytest.mark.parametrize(
    "text",
    [
        "<f></f>",
        "<f> <|>a</f>",
        "<f>a<|></f>",
        "<f>a<|>b<|>c<|>d</f>",
        "<f>a<j>b</f>",
        "a</f>b<|>c<j>",
    ],
    ids=["no title", "a blank one", "an empty one", "too many", "a marker in a title", "no beginning"],
)
def test_what_is_no_fork_is_shown_at_once(text: str) -> None:
    reader = parser()
    assert "".join(map(reader.push, text)) == text
    assert reader.titles == ()


def test_a_list_that_is_not_closed_is_text_at_the_end() -> None:
    reader = parser()
    assert [reader.push("see <f>a<|>b"), reader.refuse(), reader.push("c</f>")] == [
        "see ",
        "<f>a<|>b",
        "c</f>",
    ]


def test_a_list_with_too_many_titles_is_shown_before_it_is_closed() -> None:
    reader = parser()
    assert reader.push("<f>a<|>b<|>c") == ""
    assert reader.push("<|>") == "<f>a<|>b<|>c<|>"
