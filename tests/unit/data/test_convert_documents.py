"""With shape=documents a record has documents, and a question that reads them all."""

from __future__ import annotations

from typing import Any

import pytest
from converting import TOKENIZER, bad_reason, convert, convert_one

from parallelmind.data.convert.converter import Converter
from parallelmind.data.convert.settings import ConvertSettings
from parallelmind.data.convert.source_records import BadRecord, SourceRecord
from parallelmind.data.record_parser import parse_value


def question(text: str, *answers: str) -> dict[str, Any]:
    return {"question": text, "answers": [{"text": answer} for answer in answers]}


def article(*paragraphs: tuple[str, list[Any]], title: str = "t") -> dict[str, Any]:
    return {"title": title, "paragraphs": [{"context": text, "qas": qas} for text, qas in paragraphs]}


def documents(record: Any) -> list[str]:
    assert record.keys() == {"main", "documents", "reduce"}
    assert record["main"] == ""
    return record["documents"]


def asked(records: list[Any]) -> list[str]:
    return [record["reduce"]["prompt"] for record in records]


@pytest.mark.parametrize(
    "context",
    [
        [["T", ["One.", " Two."]], ["U", ["Three."]]],
        {"title": ["T", "U"], "sentences": [["One.", "Two."], ["Three."]]},
    ],
)
def test_the_documents_of_hotpotqa_are_documents_of_a_record(context: Any) -> None:
    value = {"context": context, "question": "who?", "answers": ["it", "they"]}
    assert convert_one(value, shape="documents") == {
        "main": "",
        "documents": ["T: One. Two.", "U: Three."],
        "reduce": {"prompt": " Question: who?\nAnswer:", "completion": " it", "references": [" they"]},
    }


@pytest.mark.parametrize("answer", [{"answer": "it"}, {"answers": ["it"]}, {"answers": {"text": ["it"]}}])
def test_rows_of_documents_a_question_and_its_answer(answer: dict[str, Any]) -> None:
    value = {"documents": ["One.", "Two."], "question": "who?", **answer}
    reduce = {"prompt": " Question: who?\nAnswer:", "completion": " it"}
    record = {"main": "", "documents": ["One.", "Two."], "reduce": reduce}
    assert convert_one(value, shape="documents") == record
    assert convert_one(value) == {"main": "One.\nTwo.", "branches": [reduce]}
    assert parse_value(record).documents == 2


def test_the_paragraphs_of_an_article_are_the_documents_of_its_questions() -> None:
    source = [
        article(("A.", [question("a?", "x"), question("b?")]), ("B.", [question("c?", "y")])),
        article(("C.", [question("d?", "z")])),
    ]
    records = convert(source, shape="documents", question_template="{question}")
    assert asked(records) == ["a?", "c?", "d?"]
    assert [documents(record) for record in records] == [["A.", "B."], ["A.", "B."], ["C."]]


def rows(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"title": title, "context": f"{title}{text}", **question(f"{text}?", "x")} for title, text in pairs
    ]


def test_rows_of_one_title_are_an_article() -> None:
    source = rows(("T", "1"), ("T", "1"), ("T", "2"), ("U", "1"), ("T", "3"))
    given = [documents(record) for record in convert(source, shape="documents")]
    assert given == [["T1", "T2"]] * 3 + [["U1"], ["T3"]]
    given = [documents(record) for record in convert(source, shape="documents", grouping="global")]
    assert given == [["T1", "T2", "T3"]] * 4 + [["U1"]]
    untitled = [{**row, "title": None} for row in source]
    given = [documents(record) for record in convert(untitled, shape="documents")]
    assert given == [["T1"], ["T1"], ["T2"], ["U1"], ["T3"]]


def test_distractors_fill_up_the_number_of_documents_in_the_order_of_the_article() -> None:
    texts = [f"{number:02}" for number in range(20)]
    source = [article(*((text, [question(f"{text}?", "x"), question(f"{text}!", "x")]) for text in texts))]
    records = convert(source, shape="documents", documents=5, question_template="{question}")
    draws = [documents(record) for record in records]
    for prompt, drawn in zip(asked(records), draws, strict=True):
        assert prompt[:2] in drawn
        assert drawn == sorted(set(drawn))
        assert len(drawn) == 5
    assert len({tuple(drawn) for drawn in draws}) > 30  # each question has its own
    assert len({text for drawn in draws for text in drawn}) == 20
    assert convert(source[::-1], shape="documents", documents=5, question_template="{question}") == records
    assert documents(convert(source, shape="documents", documents=1)[0]) == ["00"]
    assert len(documents(convert(source, shape="documents", documents=99)[0])) == 20


def test_distractors_of_the_whole_source_stand_in_random_order() -> None:
    source = [article((f"{n}.", [question(f"{n}?", "x")]), title=str(n)) for n in range(12)]
    records = convert(source, shape="documents", documents=8, distractors="all")
    draws = [documents(record) for record in records]
    assert all(len(set(draw)) == 8 and f"{n}." in draw for n, draw in enumerate(draws))
    assert len({draw.index(f"{n}.") for n, draw in enumerate(draws)}) > 3
    assert convert(source, shape="documents", documents=8, distractors="all") == records
    with pytest.raises(ValueError, match="distractors=all: needs shape=documents"):
        ConvertSettings(distractors="all")


def test_a_bad_paragraph_leaves_its_neighbours_as_documents() -> None:
    source = article(("A.", [question("a?", "x")]), ("B.", [question("b?", "y")]))
    source["paragraphs"].insert(1, {"context": "X."})
    bad, *records = convert([source], shape="documents")
    assert isinstance(bad, BadRecord)
    assert str(bad) == "0.paragraphs[1]: has no question"
    assert [documents(record) for record in records] == [["A.", "B."]] * 2


def test_titles_are_used_and_other_keys_are_not() -> None:
    for settings, expected in (({}, {"id": 1, "title": 1}), ({"shape": "documents"}, {"id": 1})):
        converter = Converter(ConvertSettings.model_validate(settings), lambda: TOKENIZER)
        list(converter.convert_records([SourceRecord("0", {**rows(("T", "1"))[0], "id": 3})]))
        assert converter.unused == expected


def test_a_number_of_documents_needs_the_shape() -> None:
    with pytest.raises(ValueError, match="documents=5: needs shape=documents"):
        ConvertSettings(documents=5)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        ConvertSettings(documents=0, shape="documents")


@pytest.mark.parametrize("context", [{"title": [], "sentences": []}, [["T", "no list"]], []])
def test_a_context_without_documents_is_bad(context: Any) -> None:
    value = {"context": context, **question("who?", "it")}
    assert "context" in bad_reason(value, shape="documents", source="hotpotqa")
