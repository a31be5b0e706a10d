"""A branch that writes a fork is forked by the engine, within its limits; a malformed fork is text."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
from engines import COLUMNAR, ISOLATED, run_to_end, tokens_by_branch
from forking import ScriptedEngine, forking_engine, forks_of, replay, tokens_by_index
from tiny import tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine import generate
from parallelmind.engine.engine import Engine
from parallelmind.engine.fork_parser import Fork
from parallelmind.engine.linear import linearized
from parallelmind.engine.output import Event
from parallelmind.engine.request import AddedSegments, ResumeState, Sample, Segment
from parallelmind.engine.tokenization import tokenize_request

BOTH = pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
SETTINGS: dict[str, Any] = {"max_new_tokens": 40, "seed": 3, "temperature": 1.0, "logprobs": 0}
END = "</s>"
LIST = {0: "see {one|two}", 1: " is" + END, 2: " are in" + END, 3: " so" + END}


def texts(events: list[Event]) -> dict[int, str]:
    found = defaultdict[int, str](str)
    for event in events:
        found[event.branch] += event.text
    return dict(found)


def answer(engine: Engine, prompt: str = "Who", **settings: Any) -> list[Event]:
    engine.submit(Sample("The passage.", [prompt]), **{**SETTINGS, **settings})
    return run_to_end(engine)


@BOTH
def test_a_fork_opens_its_branches_and_a_reduce(config: RopeConfig) -> None:
    events = answer(forking_engine(config, LIST))
    assert texts(events) == {0: "see ", 1: " is", 2: " are in", 3: " so"}
    forked = next(event for event in events if event.fork)
    assert forked.fork == Fork(("one", "two"), (1, 2), 3)
    assert {event.branch: event.finish_reason for event in events if event.finish_reason} == {
        0: "forked",
        1: "stop",
        2: "stop",
        3: "stop",
    }
    assert "".join(event.text for event in linearized(events)) == "see one istwo are in so"


@BOTH
def test_the_tokens_are_those_of_explicit_forks(config: RopeConfig) -> None:
    """Branches sample with temperature 1 after their script, until their limits."""
    script = {0: "a{one|two|the}", 2: " b{who|what}", 7: "{x|y}"}
    itself = forking_engine(config, script)
    events = answer(itself, max_new_tokens=400, ignore_eos=True)
    forks = forks_of(events)
    assert {branch: (fork.branches, fork.reduce) for branch, fork in forks.items()} == {
        0: ((1, 2, 3), 4),
        2: ((5, 6), 7),
        7: ((8, 9), 10),
    }
    own = {**SETTINGS, "max_new_tokens": 400, "ignore_eos": True}
    tokens, sample = tokens_by_index(events), Sample("The passage.", ["Who"])
    assert sum(map(len, tokens.values())) <= 400
    assert tokens_by_index(replay(forking_engine(config, script), sample, own, tokens, forks)) == tokens


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("{}", {}),
        ("{ |a}", {}),
        ("{a|b|c}", {"max_fork_branches": 2}),
        ("{a|b}", {"max_fork_branches": 0}),
        ("{a|b}", {"max_fork_depth": 0}),
        ("{a|b}", {"max_new_tokens": len(tiny_tokenizer().encode("see {a|b}")) + 3}),
        ("{a|b", {}),
        ("{a|b}", {"grammar": {"regex": "[{a|b}]+"}}),
    ],
    ids=[
        "no title",
        "blank",
        "too many",
        "switched off",
        "no depth",
        "no token left",
        "not closed",
        "a grammar",
    ],
)
def test_a_fork_that_is_malformed_or_beyond_a_limit_is_text(text: str, settings: dict[str, Any]) -> None:
    written = text if "grammar" in settings else f"see {text} so"
    events = answer(forking_engine(ISOLATED, {0: written + END}), **settings)
    assert not any(event.fork for event in events)
    assert len(texts(events)) == 1
    assert text in texts(events)[0]


def test_a_fork_that_the_engine_has_no_room_for_is_text() -> None:
    assert texts(answer(forking_engine(ISOLATED, LIST, max_branches=3))).keys() == {0}


def test_nested_forks_end_at_the_depth_limit_and_rounds_go_on() -> None:
    script = {0: "{a|b}", 1: "{c}", 4: "{d}" + END, 3: "{e|f}"}
    events = answer(forking_engine(ISOLATED, script), max_new_tokens=300, max_fork_depth=2)
    assert {event.branch for event in events if event.fork} == {0, 1, 3}
    assert "{d}" in texts(events)[4], "at the third level it is text"


def test_special_tokens_as_markers_are_not_shown() -> None:
    engine = forking_engine(ISOLATED, {0: "see <pad>one|two} x"}, markers=["<pad>", "|", "}", "<s>"])
    events = answer(engine)
    assert texts(events)[0].startswith("see ")
    assert next(event.fork for event in events if event.fork).titles == ("one", "two")


def test_linear_text_waits_for_earlier_branches_and_streams_the_first_one() -> None:
    events = answer(forking_engine(ISOLATED, {**LIST, 1: " is is is is" + END, 2: " are" + END}))
    pieces = [event.text for event in linearized(events) if event.text]
    assert "".join(pieces) == "see one is is is istwo are so"
    shown, seen = "", list[str]()
    linear = linearized(iter(events))
    for event in linear:
        shown += event.text
        seen.append(shown)
    assert any(text.endswith(" is is") for text in seen)
    last = list(linearized(events))[-1]
    assert (last.branch, last.finish_reason, last.fork) == (0, "stop", None)


def test_an_answer_of_which_a_branch_is_cut_off_ends_with_length() -> None:
    events = answer(
        forking_engine(ISOLATED, {0: "{one|two}", 1: " is so" * 9, 2: END, 3: END}), max_new_tokens=24
    )
    assert [event.finish_reason for event in linearized(events) if event.finish_reason] == ["length"]


@BOTH
def test_another_engine_goes_on_with_a_fork_whose_last_token_it_did_not_get(config: RopeConfig) -> None:
    first = forking_engine(config, LIST)
    added: list[AddedSegments] = []
    first.samples.on_fork = lambda _, segments: added.append(segments)
    events = answer(first)
    tokens = tokens_by_branch(events)
    sample = Sample("The passage.", ["Who"])
    request = tokenize_request(first.tokenizer, sample, None, None, SETTINGS)
    grown = added[0].extend(request)
    state = ResumeState(
        [int(request.tokens.lengths[0]), None, None, None], [tokens[0, 0][:-1], [], [], []], [None] * 4
    )
    second = forking_engine(config, LIST)
    second.enqueue(grown, resume=state)
    rest = run_to_end(second)
    assert [event.token for event in rest if event.branch == 0] == tokens[0, 0][-1:]
    assert next(event.fork for event in rest if event.fork) == Fork(("one", "two"), (1, 2), 3)
    assert {key: value for key, value in tokens_by_branch(rest).items() if key[1]} == {
        key: value for key, value in tokens.items() if key[1]
    }


def test_branches_that_a_request_gives_are_not_replaced() -> None:
    engine = forking_engine(ISOLATED, {0: "{one|two}" + END, 1: END})
    engine.submit(Sample("The", [Segment(" who", [" what"])]), **SETTINGS)
    events = run_to_end(engine)
    assert texts(events) == {0: "{one|two}", 1: ""}


@pytest.mark.parametrize("with_main", [False, True])
def test_independent_choices_fork_as_if_each_were_alone(with_main: bool) -> None:
    def run(prompts: int) -> list[Event]:
        engine = forking_engine(ISOLATED, lambda seed, rank: LIST.get(rank, ""))
        sample = Sample("The passage." if with_main else "", ["Who"] * prompts)
        request = tokenize_request(engine.tokenizer, sample, None, None, SETTINGS)
        engine.enqueue(replace(request, branch_number=int(with_main)))
        return run_to_end(engine)

    alone, together = run(1), run(2)
    forks = {event.branch: event.fork for event in together if event.fork}
    assert forks.keys() == {0, 1}
    for root in (0, 1):
        mine = [root, *forks[root].branches, forks[root].reduce]
        for index, branch in enumerate(mine):
            expected = [(e.token, e.pos2d) for e in alone if e.branch == index]
            assert [(e.token, e.pos2d) for e in together if e.branch == branch] == expected


def test_generate_joins_a_forked_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = forking_engine(ISOLATED, LIST)
    monkeypatch.setattr(ScriptedEngine, "script", staticmethod(lambda seed, branch: LIST.get(branch, "")))
    monkeypatch.setattr(generate, "Engine", ScriptedEngine)
    model = engine.model
    assert generate.generate(model, tiny_tokenizer(), Sample("The", ["Who"]), max_new_tokens=60) == [
        "see one istwo are in so"
    ]
