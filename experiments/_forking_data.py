"""Requests of many questions about a passage, and their answers as one list: as a text and as a fork."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

QUESTIONS = 8  # of a held-out request
_PAIRINGS = 3  # how often a passage is paired with another one, so that a request has eight questions
_ITEM = re.compile(r"\n(?P<number>\d+)\. (?P<item>[^\n]*)")
_OPENING = ":"  # of an answer
_SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z\"(])")


class Question(NamedTuple):
    """A question. sentence: of the passage, with the answer in it. answers: all that are correct."""

    text: str
    sentence: str
    answers: tuple[str, ...]


class Passage(NamedTuple):
    text: str
    questions: list[Question]


def read(path: Path) -> list[Passage]:
    """The passages of a file in the format of SQuAD."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    return [_passage(paragraph) for article in articles for paragraph in article["paragraphs"]]


def _passage(paragraph: dict[str, Any]) -> Passage:
    text = paragraph["context"]
    questions = [
        Question(
            asked["question"].strip(),
            _sentence(text, asked["answers"][0]["answer_start"]),
            tuple(answer["text"] for answer in asked["answers"]),
        )
        for asked in paragraph["qas"]
    ]
    return Passage(text, questions)


def _sentence(text: str, place: int) -> str:
    starts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text) + 1]
    number = next(number for number, start in enumerate(starts) if start > place)
    return text[starts[number - 1] : starts[number] - 1].strip()


def prompt_of(texts: Sequence[str], questions: Sequence[Question]) -> str:
    """The request: what comes before the list of answers."""
    passages = "\n".join(texts)
    asked = "".join(f"\n{number}. {question.text}" for number, question in enumerate(questions, 1))
    return f"{passages}\nQuestions:{asked}\nSentences and answers"


def title(number: int) -> str:
    """How the part of the answer to question `number` begins."""
    return f"\n{number}"


def completion(question: Question) -> str:
    """What follows the title: the sentence that holds the answer, and the answer."""
    return f". {question.sentence} => {question.answers[0].strip()}"


def answers_in(text: str) -> dict[int, str]:
    """The answers in a list, by the numbers of their questions."""
    items = _ITEM.finditer(text)
    return {int(item["number"]): item["item"].rpartition("=>")[2].strip() for item in items}


def sequential(texts: Sequence[str], questions: Sequence[Question]) -> dict[str, Any]:
    """The record whose answer is one text."""
    parts = [title(number) + completion(question) for number, question in enumerate(questions, 1)]
    return {"branches": [{"prompt": prompt_of(texts, questions), "completion": _OPENING + "".join(parts)}]}


def forking(texts: Sequence[str], questions: Sequence[Question]) -> dict[str, Any]:
    """The record whose answer forks into a branch for every question; as one text it is `sequential`'s."""
    branches = [
        {"prompt": title(number), "completion": completion(question)}
        for number, question in enumerate(questions, 1)
    ]
    root = {"prompt": prompt_of(texts, questions), "completion": _OPENING, "branches": branches}
    return {"branches": [root]}


def training_requests(passages: Sequence[Passage]) -> Iterator[tuple[list[str], list[Question]]]:
    """Each passage with its questions, and pairs of passages with up to eight questions about both."""
    rng = random.Random(0)
    for passage in passages:
        yield [passage.text], passage.questions
    for _ in range(_PAIRINGS):
        order = rng.sample(list(passages), len(passages))
        for one, other in zip(order[::2], order[1::2], strict=False):
            questions = [*one.questions, *other.questions]
            yield [one.text, other.text], rng.sample(questions, min(len(questions), QUESTIONS))


def write(source: Path, folder: Path) -> list[Passage]:
    """Write forking.sequential.jsonl and forking.forking.jsonl; returns the held-out passages.

    These are the ones with at least eight questions, cut to eight.
    """
    passages = read(source)
    rest = [passage for passage in passages if len(passage.questions) < QUESTIONS]
    requests = list(training_requests(rest))
    folder.mkdir(parents=True, exist_ok=True)
    for form in (sequential, forking):
        lines = (json.dumps(form(*request), ensure_ascii=False) + "\n" for request in requests)
        (folder / f"forking.{form.__name__}.jsonl").write_text("".join(lines), encoding="utf-8")
    return [
        Passage(passage.text, passage.questions[:QUESTIONS])
        for passage in passages
        if len(passage.questions) >= QUESTIONS
    ]
