"""Independent branches: each is decoded as if it were the only one, whatever stands beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engines import COLUMNAR, ISOLATED, run_to_end, tiny_engine, tokens_by_branch
from tiny import tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample, TokenizedRequest
from parallelmind.engine.tokenization import tokenize_request

DOCUMENT = list(range(40, 77))
QUESTIONS = [[5, 6, 7], [8], list(range(100, 121)), [9, 10]]
PUBLISHED = RopeConfig(pairs="low", branch_angle="alone", positions="flat", sibling_penalty=0)
SCHEMES = {
    "columnar": COLUMNAR,
    "isolated": ISOLATED,
    "right": RopeConfig(align_to="right", rope_2d_ratio=1.0),
    "published": PUBLISHED,
}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True}
SEEDED: dict[str, Any] = {**GREEDY, "temperature": 1.0, "seed": 7}


def request(
    main: list[int], branches: list[list[int]], number: int | None, **settings: Any
) -> TokenizedRequest:
    sample = tokenize_request(tiny_tokenizer(), Sample(main, branches), None, None, settings)
    return replace(sample, branch_number=number)


@pytest.mark.parametrize(("branches", "expected"), [(1, None), (2, 1)])
def test_a_request_that_has_forked_keeps_its_visibility(branches: int, expected: int | None) -> None:
    """The engine that resumes a request decodes it as the first engine did."""
    whole = request(DOCUMENT, QUESTIONS[:branches], 1)
    forked = whole.extend(request([], [[5], [6]], None), parent=1)
    assert [each.as_trained().branch_number for each in (whole, forked)] == [expected, expected]


def outputs(engine: Engine, *requests: TokenizedRequest) -> list[list[int]]:
    """The tokens of every branch of samples that are decoded together."""
    numbers = [engine.enqueue(each) for each in requests]
    tokens = tokens_by_branch(run_to_end(engine))
    return [tokens[key] for key in sorted(tokens, key=lambda key: (numbers.index(key[0]), key[1]))]


@pytest.mark.parametrize("settings", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("config", SCHEMES.values(), ids=SCHEMES)
def test_a_branch_is_decoded_as_alone_in_any_order(config: RopeConfig, settings: dict[str, Any]) -> None:
    engine = tiny_engine(config)
    alone = [outputs(engine, request(DOCUMENT, [question], None, **settings))[0] for question in QUESTIONS]
    assert outputs(engine, request(DOCUMENT, QUESTIONS, 1, **settings)) == alone
    assert outputs(engine, request(DOCUMENT, QUESTIONS[::-1], 1, **settings)) == alone[::-1]


@pytest.mark.parametrize("settings", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("config", SCHEMES.values(), ids=SCHEMES)
def test_branches_that_continue_main_are_decoded_as_one_text(
    config: RopeConfig, settings: dict[str, Any]
) -> None:
    engine = tiny_engine(config)
    texts = [[*DOCUMENT, *question] for question in QUESTIONS]
    alone = [outputs(engine, request([], [text], None, **settings))[0] for text in texts]
    assert outputs(engine, request(DOCUMENT, QUESTIONS, 0, **settings)) == alone
    apart = [request(DOCUMENT, [question], 0, **settings) for question in QUESTIONS]
    assert outputs(engine, *apart) == alone


def test_siblings_of_a_columnar_model_still_depend_on_each_other() -> None:
    engine = tiny_engine(COLUMNAR)
    together = outputs(engine, request(DOCUMENT, QUESTIONS, None, **GREEDY))
    assert together != outputs(engine, request(DOCUMENT, QUESTIONS, 1, **GREEDY))


@pytest.mark.parametrize("length", [501, 512, 516, 37])
def test_samples_that_arrive_together_compute_their_main_once(length: int) -> None:
    engine, document = tiny_engine(COLUMNAR, cache_tokens=8192), (DOCUMENT * 20)[:length]
    outputs(engine, *(request(document, [question], 0, **GREEDY) for question in QUESTIONS))
    computed = engine.scheduler.num_prefill.total() - engine.scheduler.num_reused_tokens
    assert computed == length + sum(map(len, QUESTIONS))


def test_the_text_of_a_branch_that_continues_main_is_that_of_one_text() -> None:
    """The first word has its space, although the branch begins with an end-of-text token."""
    engine = tiny_engine(ISOLATED)

    def text(sample: TokenizedRequest) -> str:
        engine.enqueue(sample)
        return "".join(event.text for event in run_to_end(engine))

    tokens = [*DOCUMENT, 2]
    assert text(request(DOCUMENT, [[2]], 0, **GREEDY)) == text(request([], [tokens], None, **GREEDY))
