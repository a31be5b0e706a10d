"""Trees as a model writes them: the parent writes the titles, branches begin with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny import tiny_tokenizer

from parallelmind.config import DataConfig
from parallelmind.data.forks import write_forks
from parallelmind.data.lines import Line
from parallelmind.data.record_parser import parse_value
from parallelmind.data.records import Record, RecordError
from parallelmind.data.survey import check_line
from parallelmind.data.tokenise import tokenise
from parallelmind.fork_markers import ForkMarkers

MARKERS = ForkMarkers("{", "|", "}", "~")
DATA = DataConfig(data_path="-", fork_markers=list(MARKERS))


def tree(**changes: Any) -> dict[str, Any]:
    branches = [{"prompt": " one", "completion": " is"}, {"prompt": " two", "completion": " are"}]
    reduce = {"prompt": " so", "completion": " it is"}
    root = {"prompt": "Who?", "completion": " see", "branches": branches, "reduce": reduce, **changes}
    return {"main": "The passage.", "branches": [root]}


def segments(value: dict[str, Any]) -> list[tuple[str, str]]:
    """The text of every segment after main, and the part of it that is a target."""
    (record,) = tokenise([parse_value(value)], tiny_tokenizer(), DATA)
    tokens, decode = record.tokens, tiny_tokenizer().decode
    assert tokens is not None
    cuts = np.cumsum(tokens.lengths)[:-1]
    parts = zip(np.split(tokens.ids, cuts)[1:], np.split(tokens.targets, cuts)[1:], strict=True)
    return [(decode(ids.tolist()), decode(ids[targets].tolist())) for ids, targets in parts]


def test_the_parent_writes_the_titles_and_the_reduce_writes_all_but_its_marker() -> None:
    assert segments(tree()) == [
        ("Who? see{ one| two}", " see{ one| two}"),
        (" one is</s>", " is</s>"),
        (" two are</s>", " are</s>"),
        ("~ so it is</s>", " so it is</s>"),
    ]


def test_a_fork_without_a_reduce_gets_an_empty_one() -> None:
    assert segments(tree(reduce=None))[-1] == ("~</s>", "</s>")


def test_nested_forks_are_written_and_forks_of_a_request_are_not() -> None:
    inner = tree()["branches"][0]
    value = {"main": "m", "branches": [{**inner, "branches": [{**inner, "prompt": " in"}]}], "reduce": inner}
    texts = [text for text, _ in segments(value)]
    assert texts[0] == "Who? see{ in}"
    assert texts[1] == " in see{ one| two}"
    assert texts[-4] == "Who? see{ one| two}", "a reduce that a request gives forks, too"
    read = {"main": "", "branches": [{"text": "m", "targets": [], "branches": inner["branches"]}]}
    assert segments(read)[0] == ("m</s>", "")


def test_flat_records_and_those_without_markers_stay_as_they_are() -> None:
    flat = parse_value({"main": "m", "branches": [{"prompt": "{", "completion": "a"}]})
    assert write_forks(flat, MARKERS) is flat
    assert tokenise([parse_value(tree())], tiny_tokenizer(), DataConfig(data_path="-"))[0].tokens is not None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"branches": ["text"]},
            "branches[0].branches[0] has no prompt, which fork_markers need",
        ),
        (
            {"branches": [{"prompt": " ", "completion": "a"}]},
            "branches[0].branches[0] has no prompt, which fork_markers need",
        ),
        ({"branches": [{"prompt": "a|b", "completion": "c"}]}, "prompt holds one of fork_markers"),
        ({"completion": "a{"}, "branches[0].completion holds one of fork_markers"),
        ({"reduce": "text"}, "branches[0].reduce has no completion, which fork_markers need"),
    ],
)
def test_a_fork_that_cannot_be_written_is_a_bad_record(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        write_forks(parse_value(tree(**changes)), MARKERS)
    assert reason in str(caught.value)


def test_the_survey_lists_bad_records_and_keeps_good_ones_as_they_are() -> None:
    line = Line(0, None, tree(branches=["text"]))
    assert isinstance(check_line(line, DATA, None), str)
    good = check_line(Line(0, None, tree()), DATA, None)
    assert isinstance(good, Record)
    assert good == parse_value(tree())


@pytest.mark.parametrize(
    ("markers", "reason"),
    [
        (["<f>", "|", "</f>"], "give four texts"),
        (["<f>", "|", " ", "~"], "give four texts"),
        (["<f>", "f", "</x>", "~"], "one of them is in another"),
        (["a", "b", "a", "c"], "one of them is in another"),
    ],
)
def test_bad_markers_are_named(markers: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DataConfig(data_path="-", fork_markers=markers)
