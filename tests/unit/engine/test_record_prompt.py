"""What is decoded of a record: the tokens of training up to the answers, and documents as a whole."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_tokenizer

from parallelmind.config import DataConfig
from parallelmind.data.record_parser import parse_value
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
    "nested": {
        "main": "read",
        "branches": [{**DOCUMENT, "branches": [QUESTION, DOCUMENT], "reduce": QUESTION}, QUESTION],
        "reduce": {**DOCUMENT, "branches": [QUESTION]},
    },
    "text in the reduce": {"branches": [DOCUMENT], "reduce": {"text": " who is it", "answer_offset": 2}},
}


def prompt_of(record: dict[str, Any]) -> RecordPrompt:
    return RecordPrompt.of(parse_value(record), tiny_tokenizer())


@pytest.mark.parametrize("record", TREES.values(), ids=TREES)
def test_prompts_are_the_tokens_of_training(record: dict[str, Any]) -> None:
    prompt = prompt_of(record)
    request = tokenize_request(tiny_tokenizer(), prompt.sample, None, None, {})
    (trained,) = tokenise([parse_value(record)], tiny_tokenizer(), DataConfig(data_path="-"))
    assert trained.tokens is not None
    main, *segments = trained.tokens.split()
    given_main, *given_segments = request.tokens.split()
    assert given_main == main
    assert request.tokens.tree.parents.tolist() == trained.tokens.tree.parents.tolist()
    assert request.tokens.tree.is_reduce.tolist() == trained.tokens.tree.is_reduce.tolist()
    for index, (given, segment) in enumerate(zip(given_segments, segments, strict=True)):
        assert segment[: len(given)] == given
        assert (given == segment) == (index in prompt.documents)
    is_read_only = [params.max_new_tokens == 0 for params in request.params]
    assert is_read_only == [index in prompt.documents for index in range(len(segments))]


def test_a_document_is_shown_as_its_text() -> None:
    prompt = prompt_of(TREES["beside main"])
    assert prompt.to_row() == {
        "main": "read",
        "branches": [" the passage", " who lives?"],
        "reduce": " who lives?",
    }
    assert prompt.documents == {0: " the passage"}
    assert (prompt.num_outputs, prompt.decoded) == (3, [1, 2])


def test_a_flat_text_is_continued_at_its_end_whatever_its_targets() -> None:
    prompt = prompt_of({"text": "the", "answer_offset": 99})
    assert (prompt.documents, prompt.decoded, prompt.sample.reduce) == ({}, [0], None)


def test_a_reduce_without_target_is_left_out() -> None:
    assert prompt_of({"branches": [QUESTION], "reduce": DOCUMENT}).sample.reduce is None
    below = {**QUESTION, "branches": [QUESTION], "reduce": DOCUMENT}
    assert prompt_of({"branches": [below], "reduce": QUESTION}).num_outputs == 3


def test_a_row_shows_the_tree_and_the_texts_of_documents() -> None:
    prompt = prompt_of(TREES["nested"])
    assert (prompt.documents.keys(), prompt.decoded) == ({0, 2, 5}, [1, 3, 4, 6])
    below = {"text": " the passage", "branches": [" who lives?", " the passage"], "reduce": " who lives?"}
    assert prompt.to_row() == {
        "main": "read",
        "branches": [below, " who lives?"],
        "reduce": {"text": " the passage", "branches": [" who lives?"]},
    }
