"""Pairs, passages and plain text to parallel JSONL, and what is said about a record that gives none."""

from __future__ import annotations

from typing import Any

import pytest
from converting import TOKENIZER, bad_reason, made
from tiny import tiny_tokenizer
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerBase

from parallelmind.config import DataConfig
from parallelmind.data.convert.chunks import chunks
from parallelmind.data.convert.converter import Converter, ConvertSettings
from parallelmind.data.convert.items import Bad, Item
from parallelmind.data.records import parse_value
from parallelmind.data.tokenise import tokenise
from parallelmind.errors import UserError


def test_pairs_are_taken_as_they_are_and_questions_worded() -> None:
    values = [{"prompt": "who ", key: " it", "id": 3} for key in ("response", "completion", "output")]
    assert made(values) == [{"prompt": "who ", "completion": " it"}] * 3
    worded = {"prompt": " Question: who?\nAnswer:", "completion": " it\n#### 7"}
    assert made([{"question": "who?", "answer": "it\n#### 7"}]) == [worded]
    assert bad_reason({"prompt": "who"}, source="pairs").startswith("has none of prompt + response")
    assert bad_reason({"prompt": "who", "response": ""}) == "response is empty"


def test_alpaca() -> None:
    with_input, without = made(
        [
            {"instruction": "Say who.", "input": "in", "output": "it"},
            {"instruction": "Say who.", "input": "", "output": "it"},
        ]
    )
    expected = "### Instruction:\nSay who.\n\n### Input:\nin\n\n### Response:\n"
    assert with_input == {"prompt": expected, "completion": "it"}
    assert without == {"prompt": "### Instruction:\nSay who.\n\n### Response:\n", "completion": "it"}
    assert bad_reason({"instruction": "Say who."}, source="alpaca") == "has no output"


def article(*qas: tuple[str, list[str]]) -> dict[str, Any]:
    questions = [
        {"question": question, "answers": [{"text": text} for text in answers]} for question, answers in qas
    ]
    return {"title": "t", "paragraphs": [{"context": "A passage.", "qas": questions}]}


def branch(question: str, answer: str) -> dict[str, str]:
    return {"prompt": f" Question: {question}\nAnswer:", "completion": f" {answer}"}


def test_squad_passages_hold_their_questions() -> None:
    converter = Converter(ConvertSettings(), lambda: TOKENIZER)
    items = [
        Item("f:data[0]", article(("who?", ["it", "they"]), ("where?", []))),
        Item("f:data[1]", {"paragraphs": [{"qas": 3}]}),
    ]
    record, bad = converter.items(items)
    expected = {**branch("who?", "it"), "references": [" they"]}
    assert bad == {"main": "A passage.", "branches": [expected]}  # said once the passage is over
    assert record == Bad("f:data[1].paragraphs[0]", "has no context")
    assert (converter.read, converter.unanswered) == (2, 1)


def test_further_answers_are_named_once_and_cost_no_record() -> None:
    answers: list[Any] = ["it", " it ", "they", None, " ", "\ud800", "they"]
    (record,) = made([article(("who?", answers))], answer_template="[{answer}]")
    assert isinstance(record, dict)
    assert record["branches"][0]["references"] == ["[they]"]


def test_templates_are_filled_in() -> None:
    (record,) = made(
        [article(("{who}?", ["it"]))], question_template="Q{question}{x}", answer_template="[{answer}]"
    )
    assert record == {"main": "A passage.", "branches": [{"prompt": "Q{who}?{x}", "completion": "[it]"}]}
    with pytest.raises(ValueError, match="has no {answer}"):
        ConvertSettings(answer_template="x")


def test_hotpotqa_in_both_writings_and_flat_squad() -> None:
    pairs, columns = (
        [["T", ["One.", " Two."]], ["U", ["Three."]]],
        {"title": ["T", "U"], "sentences": [["One.", "Two."], ["Three."]]},
    )
    (record,) = made(
        [
            {"context": pairs, "question": "who?", "answer": "it"},
            {"context": columns, "question": "yes?", "answer": "yes"},
        ]
    )
    assert record == {
        "main": "T: One. Two.\nU: Three.",
        "branches": [branch("who?", "it"), branch("yes?", "yes")],
    }
    (flat,) = made(
        [{"context": "A passage.", "question": "who?", "answers": {"text": ["it"], "answer_start": [0]}}]
    )
    assert flat == {"main": "A passage.", "branches": [branch("who?", "it")]}


def test_grouping_follows_the_order_or_gathers_all() -> None:
    rows = [{"context": main, "question": str(index), "answer": "x"} for index, main in enumerate("aaba")]
    assert [(r["main"], len(r["branches"])) for r in made(rows) if isinstance(r, dict)] == [
        ("a", 2),
        ("b", 1),
        ("a", 1),
    ]
    together = made(rows, grouping="global")
    assert [(r["main"], len(r["branches"])) for r in together if isinstance(r, dict)] == [("a", 3), ("b", 1)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"context": [["T", "no list"]]}, "neither a text nor titles"),
        ({"context": {"title": ["T"], "sentences": []}}, "neither a text nor titles"),
        ({"context": []}, "has no context"),
        ({"question": 3}, "question is not text"),
        ({"answer": None}, "neither answers nor answer"),
        ({"answer": " "}, "answers is empty"),
        ({"qas": []}, "qas is no list of questions"),
        ({"qas": [{"question": "who?"}]}, "qas[0] has neither answers nor answer"),
    ],
)
def test_bad_questions(change: dict[str, Any], reason: str) -> None:
    assert reason in bad_reason(
        {"context": "A passage.", "question": "who?", "answer": "it", **change}, source="hotpotqa"
    )


def texts(pieces: list[str], limit: int, tokenizer: PreTrainedTokenizerBase = TOKENIZER) -> list[str]:
    found = [item["text"] for item in chunks(pieces, tokenizer, limit) if not isinstance(item, Bad)]
    for text in found:
        (done,) = tokenise([parse_value({"text": text})], tokenizer, DataConfig(data_path="-"))
        assert done.tokens is not None
        assert len(done.tokens.ids) <= limit
    return found


@pytest.mark.parametrize(
    "text", ["who lives in the passage " * 40, "où 😀 " * 80, "答案在文章里。" * 60, "x" * 500]
)
def test_chunks_cover_the_text_and_fit(text: str) -> None:
    found = texts([text], 64)
    assert "".join(found) == text
    assert len(found) > 1
    if text.startswith("who"):
        assert all(chunk.endswith(" ") or chunk.startswith(" ") or chunk == found[0] for chunk in found)


def test_a_chunk_has_room_for_bos() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    assert "".join(texts(["x" * 500], 64, tokenizer)) == "x" * 500


def test_long_text_is_cut_block_by_block_and_blanks_are_left_out() -> None:
    lines = [f"line {number} of the passage\n" for number in range(6000)]
    assert "".join(texts(lines, 512)) == "".join(lines)
    assert texts(["", " \n"], 64) == []


def test_trimmed_spans_lose_no_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevel(trim_offsets=True)])
    text = "  who  lives in\n the passage " * 40
    assert "".join(texts([text], 64, tokenizer)) == text


def test_an_unknown_kind_names_the_choices() -> None:
    for value in ({"body": "x"}, ["x"], {"main": "m", "branches": ["b"]}, {"text": "x", "answer_offset": 2}):
        with pytest.raises(UserError, match="set source to one of messages, sharegpt"):
            made([value])
