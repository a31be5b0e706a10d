"""The data of experiment 008: one list of answers as a text and as a fork, without held-out passages."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from experiments._forking_data import QUESTIONS, answers_in, prompt_of, write

ARTICLES = 6


@pytest.fixture
def data(tmp_path: Path) -> Path:
    def paragraph(number: int) -> dict[str, Any]:
        asked = [(f"{number}.{question}", f"a{number}-{question}") for question in range(5)]
        qas = [{"question": f"What is {q}?", "answers": [{"text": answer}]} for q, answer in asked]
        return {"context": f"passage{number} is here.", "qas": qas}

    articles = [
        {"paragraphs": [paragraph(2 * number), paragraph(2 * number + 1)]} for number in range(ARTICLES)
    ]
    (tmp_path / "xquad.json").write_text(json.dumps({"data": articles}))
    return tmp_path


def records(folder: Path, form: str) -> list[Any]:
    lines = (folder / f"forking.{form}.jsonl").read_text().splitlines()
    return [json.loads(line)["branches"][0] for line in lines]


def test_both_forms_are_one_text_with_all_answers(data: Path) -> None:
    write(data / "xquad.json", data)
    for sequential, forking in zip(records(data, "sequential"), records(data, "forking"), strict=True):
        parts = [branch["prompt"] + branch["completion"] for branch in forking["branches"]]
        assert sequential["prompt"] == forking["prompt"]
        assert sequential["completion"] == forking["completion"] + "".join(parts)
        given = answers_in(sequential["completion"])
        assert [*given] == list(range(1, len(parts) + 1))
        for answer, part in zip(given.values(), parts, strict=True):
            assert f"What is {answer[1:].replace('-', '.')}? => {answer}" in part


def test_held_out_passages_are_in_no_record(data: Path) -> None:
    requests = write(data / "xquad.json", data)
    trained = " ".join(record["prompt"] for record in records(data, "forking"))
    assert requests
    for request in requests:
        assert len(request.questions) == QUESTIONS
        assert len(request.texts) == 2
        assert not any(text in trained for text in request.texts)
        places = [prompt_of(request).index(question.text) for question in request.questions]
        assert all(one < other for one, other in pairwise(places))
