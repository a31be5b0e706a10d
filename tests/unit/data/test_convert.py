"""Convert pairs, passages and plain text to parallel JSONL; report records that cannot be converted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from converting import TOKENIZER, bad_reason, convert
from tiny import tiny_tokenizer
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerBase

from parallelmind.config import DataConfig
from parallelmind.data.convert.chunks import chunk_text
from parallelmind.data.convert.converter import Converter
from parallelmind.data.convert.settings import ConvertSettings
from parallelmind.data.convert.source_records import BadRecord, SourceRecord
from parallelmind.data.record_parser import parse_value
from parallelmind.data.tokenise import tokenise
from parallelmind.errors import UserError


def test_pairs_are_kept_and_questions_go_through_the_templates() -> None:
    values = [{"prompt": "who ", key: " it", "id": 3} for key in ("response", "completion", "output")]
    assert convert(values) == [{"prompt": "who ", "completion": " it"}] * 3
    templated = {"prompt": " Question: who?\nAnswer:", "completion": " it\n#### 7"}
    assert convert([{"question": "who?", "answer": "it\n#### 7"}]) == [templated]
    assert bad_reason({"prompt": "who"}, source="pairs").startswith("has none of prompt + response")
    assert bad_reason({"prompt": "who", "response": ""}) == "response is empty"


def test_alpaca_becomes_the_published_prompt() -> None:
    with_input, without = convert(
        [
            {"instruction": "Say who.", "input": "in", "output": "it"},
            {"instruction": "Say who.", "input": "", "output": "it"},
        ]
    )
    expected = "### Instruction:\nSay who.\n\n### Input:\nin\n\n### Response:\n"
    assert with_input == {"prompt": expected, "completion": "it"}
    assert without == {"prompt": "### Instruction:\nSay who.\n\n### Response:\n", "completion": "it"}
    assert bad_reason({"instruction": "Say who."}, source="alpaca").startswith(
        "has none of instruction + output"
    )


def article(*qas: tuple[str, list[str]]) -> dict[str, Any]:
    questions = [
        {"question": question, "answers": [{"text": text} for text in answers]} for question, answers in qas
    ]
    return {"title": "t", "paragraphs": [{"context": "A passage.", "qas": questions}]}


def branch(question: str, answer: str) -> dict[str, str]:
    return {"prompt": f" Question: {question}\nAnswer:", "completion": f" {answer}"}


def test_squad_passages_hold_their_questions() -> None:
    converter = Converter(ConvertSettings(), lambda: TOKENIZER)
    records = [
        SourceRecord("f:data[0]", article(("who?", ["it", "they"]), ("where?", []))),
        SourceRecord("f:data[1]", {"paragraphs": [{"qas": 3}]}),
    ]
    bad, record = converter.convert_records(records)
    expected = {**branch("who?", "it"), "references": [" they"]}
    assert record == {"main": "A passage.", "branches": [expected]}  # follows the end of the passage
    assert bad == BadRecord("f:data[1].paragraphs[0]", "has no context")
    assert (converter.records_read, converter.unanswered) == (2, 1)


def test_other_answers_become_references_once_and_bad_ones_are_ignored() -> None:
    answers: list[Any] = ["it", " it ", "they", None, " ", "\ud800", "they"]
    (record,) = convert([article(("who?", answers))], answer_template="[{answer}]")
    assert isinstance(record, dict)
    assert record["branches"][0]["references"] == ["[they]"]


def test_templates_are_filled_in() -> None:
    (record,) = convert(
        [article(("{who}?", ["it"]))], question_template="Q{question}{x}", answer_template="[{answer}]"
    )
    assert record == {"main": "A passage.", "branches": [{"prompt": "Q{who}?{x}", "completion": "[it]"}]}
    with pytest.raises(ValueError, match="has no {answer}"):
        ConvertSettings(answer_template="x")


def test_hotpotqa_in_both_forms_and_squad_rows() -> None:
    pairs, columns = (
        [["T", ["One.", " Two."]], ["U", ["Three."]]],
        {"title": ["T", "U"], "sentences": [["One.", "Two."], ["Three."]]},
    )
    (record,) = convert(
        [
            {"context": pairs, "question": "who?", "answer": "it"},
            {"context": columns, "question": "yes?", "answer": "yes"},
        ]
    )
    assert record == {
        "main": "T: One. Two.\nU: Three.",
        "branches": [branch("who?", "it"), branch("yes?", "yes")],
    }


@pytest.mark.parametrize("answers", [{"text": ["it"], "answer_start": [0]}, ["it"], [{"text": "it"}]])
def test_answers_of_a_row_may_be_json_text(answers: Any) -> None:
    row = {"context": "A passage.", "question": "who?", "answers": answers}
    expected: dict[str, Any] = {"main": "A passage.", "branches": [branch("who?", "it")]}
    assert convert([row, {**row, "answers": json.dumps(answers)}], grouping="global") == [
        {**expected, "branches": 2 * expected["branches"]}
    ]
    assert convert([{**row, "answers": "[1]"}]) == [{**expected, "branches": [branch("who?", "[1]")]}]


def test_grouping_is_consecutive_or_global() -> None:
    rows = [{"context": main, "question": str(index), "answer": "x"} for index, main in enumerate("aaba")]
    assert [(r["main"], len(r["branches"])) for r in convert(rows) if isinstance(r, dict)] == [
        ("a", 2),
        ("b", 1),
        ("a", 1),
    ]
    grouped = convert(rows, grouping="global")
    assert [(r["main"], len(r["branches"])) for r in grouped if isinstance(r, dict)] == [("a", 3), ("b", 1)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"context": [["T", "no list"]]}, "neither a text nor titles"),
        ({"context": {"title": ["T"], "sentences": []}}, "neither a text nor titles"),
        ({"context": []}, "has no context"),
        ({"question": 3}, "question is not text"),
        ({"answer": None}, "neither answers nor answer"),
        ({"answer": " "}, "answers is empty"),
        ({"qas": []}, "qas is not a list of questions"),
        ({"qas": [{"question": "who?"}]}, "qas[0] has neither answers nor answer"),
    ],
)
def test_reason_of_a_bad_question(change: dict[str, Any], reason: str) -> None:
    assert reason in bad_reason(
        {"context": "A passage.", "question": "who?", "answer": "it", **change}, source="hotpotqa"
    )


def chunk_texts(pieces: list[str], limit: int, tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> list[str]:
    """The texts of the chunks, each checked to be within the limit in training."""
    results = chunk_text(pieces, tokenizer, limit)
    texts = [result["text"] for result in results if not isinstance(result, BadRecord)]
    for text in texts:
        (record,) = tokenise([parse_value({"text": text})], tokenizer, DataConfig(data_path="-"))
        assert record.tokens is not None
        assert len(record.tokens.ids) <= limit
    return texts


@pytest.mark.parametrize(
    "text", ["who lives in the passage " * 40, "où 😀 " * 80, "答案在文章里。" * 60, "x" * 500]
)
def test_chunks_cover_the_text_and_fit(text: str) -> None:
    chunks = chunk_texts([text], 64)
    assert "".join(chunks) == text
    assert len(chunks) > 1
    if text.startswith("who"):
        assert all(chunk.endswith(" ") or chunk.startswith(" ") or chunk == chunks[0] for chunk in chunks)


def test_chunk_has_room_for_bos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert "".join(chunk_texts(["x" * 500], 64, tokenizer)) == "x" * 500


def test_long_text_is_split_by_blocks_without_blank_chunks() -> None:
    lines = [f"line {number} of the passage\n" for number in range(6000)]
    assert "".join(chunk_texts(lines, 512)) == "".join(lines)
    assert chunk_texts(["", " \n"], 64) == []


def test_spans_without_white_space_lose_no_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=True)])
    text = "  who  lives in\n the passage " * 40
    assert "".join(chunk_texts([text], 64, tokenizer)) == text


def test_unknown_kind_of_source_is_an_error_that_lists_the_kinds() -> None:
    for value in ({"body": "x"}, ["x"], {"main": "m", "branches": ["b"]}, {"text": "x", "answer_offset": 2}):
        with pytest.raises(UserError, match="set source to one of messages, sharegpt"):
            convert([value])
