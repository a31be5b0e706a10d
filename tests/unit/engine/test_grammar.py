"""Branches that follow a grammar: valid texts, the same tokens in any company, and bounded compilation."""

from __future__ import annotations

import json
import re
import time
from contextlib import suppress
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from engines import decode, run_to_end, tiny_engine, tokens_by_branch
from sampling_rows import Row
from tiny import tiny_tokenizer

from parallelmind.engine.engine import Engine
from parallelmind.engine.grammar import MAX_GRAMMAR_CHARS, Grammar
from parallelmind.engine.grammar_matcher import TokenMasks
from parallelmind.engine.output import Event
from parallelmind.engine.request import ResumeState, Sample, TokenizedRequest
from parallelmind.engine.sampler import Sampler
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.tokenization import tokenize_request
from parallelmind.errors import UserError

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["ship", "crew"]}, "count": {"type": "integer", "maximum": 999}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
DRAWN = {"temperature": 1.5, "max_new_tokens": 60}


def texts(events: list[Event]) -> dict[int, str]:
    found: dict[int, str] = {}
    for event in events:
        assert event.error is None, event.error
        found[event.branch] = found.get(event.branch, "") + event.text
    return found


def answers(engine: Engine, branches: list[str], **settings: Any) -> dict[int, str]:
    engine.submit(Sample("The answer is in", branches), **settings)
    return texts(run_to_end(engine))


@pytest.mark.parametrize("seed", range(5))
def test_a_schema_is_followed(seed: int) -> None:
    for text in answers(
        tiny_engine(), ["who ", "what "], grammar={"json": SCHEMA}, seed=seed, **DRAWN
    ).values():
        found = json.loads(text)
        assert found["kind"] in ("ship", "crew")
        assert found["count"] <= 999


def test_a_regular_expression_and_a_choice_are_followed() -> None:
    engine = tiny_engine()
    settings = [
        {"grammar": {"regex": "[0-9]{3}-[a-f]{2}"}},
        {"grammar": {"choice": ["north", 'nörd "x"']}},
        {},
    ]
    engine.submit(Sample("The", ["a", "b", "c"]), per_branch=settings, seed=3, **DRAWN)
    found = texts(run_to_end(engine))
    assert re.fullmatch("[0-9]{3}-[a-f]{2}", found[0])
    assert found[1] in ("north", 'nörd "x"')


def test_a_complete_text_ends_its_branch() -> None:
    engine = tiny_engine()
    engine.submit(Sample("The", ["a"]), grammar={"choice": ["north"]}, max_new_tokens=60)
    events = run_to_end(engine)
    assert events[-1].finish_reason == "stop"
    assert [event.token for event in events] == tiny_tokenizer().encode("north", add_special_tokens=False)


def test_the_limit_of_tokens_cuts_a_text_off() -> None:
    engine = tiny_engine()
    engine.submit(Sample("The", ["a"]), grammar={"json": SCHEMA}, max_new_tokens=3)
    assert run_to_end(engine)[-1].finish_reason == "length"


def test_tokens_do_not_depend_on_the_company() -> None:
    alone = decode(tiny_engine(), Sample("The", ["a"]), grammar={"json": SCHEMA}, seed=7, **DRAWN)
    engine = tiny_engine()
    first = engine.submit(Sample("The", ["a"]), grammar={"json": SCHEMA}, seed=7, **DRAWN)
    engine.submit(Sample("in the passage", ["x", "y"]), grammar={"regex": "[a-z]{9}"}, seed=1, **DRAWN)
    engine.submit(Sample("who", ["z"]), seed=2, **DRAWN)
    assert [tokens_by_branch(run_to_end(engine))[first, 0]] == alone


def test_a_preempted_branch_continues_its_grammar() -> None:
    settings: dict[str, Any] = {"grammar": {"json": SCHEMA}, "seed": 7, **DRAWN}
    alone = decode(tiny_engine(), Sample("The", ["a"]), **settings)
    engine = tiny_engine()
    sample = engine.submit(Sample("The", ["a"]), **settings)
    events = [event for _ in range(6) for event in engine.step()]
    with engine.state_lock:
        group = engine.samples.groups[sample]
        engine.runner.forget(group)
        engine.scheduler.recompute(group)
    events += run_to_end(engine)
    assert [tokens_by_branch(events)[sample, 0]] == alone


def test_another_engine_rebuilds_the_grammar_from_the_tokens() -> None:
    params: dict[str, Any] = {"grammar": {"json": SCHEMA}, "seed": 7, **DRAWN}
    engine = tiny_engine()
    request: TokenizedRequest = tokenize_request(tiny_tokenizer(), Sample("The", ["a"]), None, None, params)
    engine.enqueue(request)
    events = run_to_end(engine)
    tokens = [event.token for event in events if event.token is not None]
    start = events[0].pos2d[1] - 1  # type: ignore[index]
    for count in (1, len(tokens) // 2, len(tokens) - 1):
        other = tiny_engine()
        other.enqueue(request, resume=ResumeState([start], [tokens[:count]], [None]))
        assert [event.token for event in run_to_end(other)] == tokens[count:]


def test_log_probabilities_are_of_the_allowed_tokens() -> None:
    engine = tiny_engine()
    engine.submit(
        Sample("The", ["a"]), grammar={"regex": "[ab]{8}"}, logprobs=20, max_new_tokens=8, temperature=1.0
    )
    for event in run_to_end(engine):
        total = sum(np.exp(value) for _, value in event.top)
        assert total == pytest.approx(1, abs=1e-5)
        assert all(set(tiny_tokenizer().decode([token])) <= {"a", "b"} for token, _ in event.top)


def test_masks_are_applied_to_their_rows_alone() -> None:
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    bits = np.zeros((2, 40), np.uint8)
    bits[0, 2], bits[1, 37] = 1 << 3, 1 << 3  # tokens 19 and 299
    rows = [Row(SamplingParams(logit_bias={5: 100}), 0, 0, 0, [])] * 3
    found = Sampler()(logits.clone(), rows, TokenMasks(np.array([0, 2]), bits)).read()
    assert [sampled.token for sampled in found] == [19, 5, 299]


def test_a_grammar_and_ignore_eos_contradict_each_other() -> None:
    with pytest.raises(UserError, match="ignore_eos"):
        SamplingParams(grammar={"regex": "a"}, ignore_eos=True)  # type: ignore[arg-type]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def properties(count: int, first: int = 0) -> dict[str, Any]:
    names = [f"p{index}" for index in range(first, first + count)]
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}}


WRONG: dict[str, dict[str, Any]] = {
    "two": {"json": {}, "regex": "a"},
    "kind": {"xml": "a"},
    "no text": {"regex": ""},
    "not a schema": {"json": "[1"},
    "a list": {"json": [1]},
    "unknown type": {"json": {"type": "strng"}},
    "unknown keyword": {"json": {"type": "object", "if": {}}},
    "open group": {"regex": "(a"},
    "no choice": {"choice": []},
    "empty choice": {"choice": [""]},
    "other file": {"json": {"$ref": "http://127.0.0.1/schema"}},
    "circle": {
        "json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    },
    "deep": {"json": nested(100)},
    "very deep": {"json": nested(3000)},
    "long": {"json": {"enum": [f"value {index}" for index in range(MAX_GRAMMAR_CHARS // 10)]}},
    "many items": {"json": {"type": "array", "items": {"type": "string"}, "minItems": 10**9}},
    "large number": {"json": {"type": "array", "maxItems": 1e300}},
    "multiple": {"json": {"type": "integer", "multipleOf": 999983}},
    "multiples": {"json": {"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 991}]}},
    "repeats": {"regex": "(a{99999}){99999}"},
    "all of any of": {
        "json": {"allOf": [{"anyOf": [{"required": [f"x{i}_{j}"]} for j in range(6)]} for i in range(8)]}
    },
}

# These compile, or they are refused: either within the time and the memory.
BOMBS: dict[str, dict[str, Any]] = {
    "nested quantifiers": {"regex": "((((a{0,200}){0,200}){0,200}){0,200})"},
    "alternatives": {"regex": "(.*a.{900}|.*b.{900})"},
    "automaton": {"regex": "(a|b)*a(a|b){24}"},
    "negations": {"regex": "([^x]{1,500}[^y]{1,500}){1,500}"},
    "enum": {"json": {"enum": [f"v{index}" for index in range(6000)]}},
    "any of": {"json": {"anyOf": [properties(5, first) for first in range(300)]}},
    "properties": {"json": properties(1800)},
    "required": {"json": {**properties(900), "required": [f"p{index}" for index in range(0, 900, 2)]}},
    "recursion": {
        "json": {
            "$ref": "#/$defs/node",
            "$defs": {"node": {"properties": {f"p{i}": {"$ref": "#/$defs/node"} for i in range(100)}}},
        }
    },
    "long string": {"json": {"type": "string", "pattern": "^a*$", "minLength": 9999, "maxLength": 10000}},
    "multiple": {"json": {"type": "integer", "multipleOf": 9973}},
    "patterns": {"json": {"allOf": [{"type": "string", "pattern": f"^.*a.{{{i}}}b"} for i in range(12)]}},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_grammar_is_refused(name: str) -> None:
    start = time.thread_time()
    with pytest.raises(UserError, match=r"grammar[=:]") as caught:
        decode(tiny_engine(), Sample("The", ["a"]), grammar=WRONG[name], max_new_tokens=2)
    assert "\n" not in str(caught.value)
    assert time.thread_time() - start < 3


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_takes_bounded_time_and_memory(name: str) -> None:
    engine, process = tiny_engine(), psutil.Process()
    decode(engine, Sample("The", ["a"]), grammar={"regex": "a"}, max_new_tokens=2)  # compiles the vocabulary
    start, memory = time.process_time(), process.memory_info().rss
    with suppress(UserError):
        decode(engine, Sample("The", ["a"]), grammar=BOMBS[name], max_new_tokens=30)
    assert time.process_time() - start < 5
    assert process.memory_info().rss - memory < 300e6


def test_a_grammar_that_runs_out_of_its_limits_ends_its_branch_alone() -> None:
    engine = tiny_engine()
    settings = [{"grammar": BOMBS["negations"]}, {}]
    engine.submit(Sample("The", ["a", "b"]), per_branch=settings, temperature=1.0, seed=1, max_new_tokens=40)
    last = {event.branch: event for event in run_to_end(engine)}
    assert "too complex" in str(last[0].error)
    assert last[1].error is None


def test_equal_grammars_are_compiled_once() -> None:
    engine = tiny_engine()
    first = engine._grammars.compile(Grammar.of({"json": SCHEMA}))
    assert engine._grammars.compile(Grammar.of({"json": json.dumps(SCHEMA)}, "response_format")) is first
