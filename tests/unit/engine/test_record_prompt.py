"""What is decoded of a record: the tokens of training up to the answers, and documents as a whole."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_tokenizer

from parallelmind.config import DataConfig
from parallelmind.data.record_parser import parse_value
from parallelmind.data.records import RecordError
from parallelmind.data.tokenise import tokenise
from parallelmind.engine.record_prompt import RecordPrompt
from parallelmind.engine.tokenization import tokenize_request

QUESTION = {"prompt": " who lives?", "completion": " a cat"}
DOCUMENT = {"text": " the passage", "targets": []}
TREES: dict[str, dict[str, Any]] = {
    "documents": {"branches": [DOCUMENT, {**DOCUMENT, "rendered": True}], "reduce": QUESTION},
    "beside main": {"main": "read", "branches": [DOCUMENT, QUESTION], "reduce": QUESTION},
    "ids": {"branches": [{"input_ids": [5, 6], "targets": []}], "reduce": QUESTION},
    "targets after the end": {"branches": [{"text": "the", "answer_offset": 99}], "reduce": QUESTION},
    "text in the reduce": {"branches": [DOCUMENT], "reduce": {"text": " who is it", "answer_offset": 2}},
}


def prompt_of(record: dict[str, Any]) -> RecordPrompt:
    return RecordPrompt.of(parse_value(record), tiny_tokenizer())


@pytest.mark.parametrize("record", TREES.values(), ids=TREES)
def test_prompts_are_the_tokens_of_training(record: dict[str, Any]) -> None:
    prompt = prompt_of(record)
    request = tokenize_request(tiny_tokenizer(), prompt.sample, prompt.per_branch, prompt.reduce, {})
    (trained,) = tokenise([parse_value(record)], tiny_tokenizer(), DataConfig(data_path="-"))
    assert request.reduce is not None
    assert trained.tokens is not None
    main, *branches, reduce = trained.tokens.split()
    given_main, *given_branches = request.tokens.split()
    assert given_main == main
    assert reduce[: len(request.reduce.token_ids)] == request.reduce.token_ids != reduce
    for index, (given, branch) in enumerate(zip(given_branches, branches, strict=True)):
        assert branch[: len(given)] == given
        assert (given == branch) == (index in prompt.documents)
    new_tokens = [params.max_new_tokens for params in request.params]
    assert [count == 0 for count in new_tokens] == [
        index in prompt.documents for index in range(len(branches))
    ]


def test_a_document_is_shown_as_its_text() -> None:
    prompt = prompt_of(TREES["beside main"])
    assert prompt.branches == [" the passage", " who lives?"]
    assert prompt.documents == {0: " the passage"}
    assert (prompt.num_outputs, prompt.decoded) == (3, [1, 2])


def test_a_flat_text_is_continued_at_its_end_whatever_its_targets() -> None:
    prompt = prompt_of({"text": "the", "answer_offset": 99})
    assert (prompt.documents, prompt.decoded, prompt.reduce) == ({}, [0], None)


def test_a_reduce_without_target_is_left_out() -> None:
    assert prompt_of({"branches": [QUESTION], "reduce": DOCUMENT}).reduce is None


@pytest.mark.parametrize(
    ("record", "place"),
    [
        ({"branches": ["a", {**QUESTION, "branches": ["b"]}]}, r"branches\[1\]"),
        ({"branches": ["a"], "reduce": {**QUESTION, "branches": ["b"]}}, "reduce"),
    ],
)
def test_nested_branches_are_refused(record: dict[str, Any], place: str) -> None:
    with pytest.raises(RecordError, match=f"^{place} has branches, and decoding takes one level.*; leave"):
        prompt_of(record)
