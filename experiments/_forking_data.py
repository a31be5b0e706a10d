"""Requests of many questions about a passage, and their answers as one list: as a text and as a fork."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

QUESTIONS = 8  # of a held-out request, and the most of any
_HELD_OUT = 1 / 4  # of the passages, the last ones
_PAIRINGS = 2  # how often a passage for training is paired with another one
_ITEM = re.compile(r"^(?P<number>\d+)\. (?P<item>.*)$", re.MULTILINE)
_OPENING = ":\n"  # of an answer


class Question(NamedTuple):
    """A question. answers: all that are correct."""

    text: str
    answers: tuple[str, ...]


class Passage(NamedTuple):
    text: str
    questions: list[Question]


class Request(NamedTuple):
    """Passages, and questions about them."""

    texts: list[str]
    questions: list[Question]


def read(path: Path) -> list[Passage]:
    """The passages of a file in the format of SQuAD."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    return [_passage(paragraph) for article in articles for paragraph in article["paragraphs"]]


def _passage(paragraph: dict[str, Any]) -> Passage:
    questions = [
        Question(asked["question"].strip(), tuple(answer["text"] for answer in asked["answers"]))
        for asked in paragraph["qas"]
    ]
    return Passage(paragraph["context"], questions)


def prompt_of(request: Request) -> str:
    """What comes before the list of answers."""
    passages = "\n".join(request.texts)
    asked = "".join(f"\n{number}. {question.text}" for number, question in enumerate(request.questions, 1))
    return f"{passages}\nQuestions:{asked}\nQuestions and answers"


def title(number: int) -> str:
    """How the part of the answer to question `number` begins."""
    return str(number)


def completion(question: Question) -> str:
    """What follows the title: the question, so that the branch reads it once more, and the answer."""
    return f". {question.text} => {question.answers[0].strip()}\n"


def answers_in(text: str) -> dict[int, str]:
    """The answers in a list, by the numbers of their questions."""
    items = _ITEM.finditer(text)
    return {int(item["number"]): item["item"].rpartition("=>")[2].strip() for item in items}


def sequential(request: Request) -> dict[str, Any]:
    """The record whose answer is one text."""
    parts = [title(number) + completion(question) for number, question in enumerate(request.questions, 1)]
    return {"branches": [{"prompt": prompt_of(request), "completion": _OPENING + "".join(parts)}]}


def forking(request: Request) -> dict[str, Any]:
    """The record whose answer forks into a branch for every question; as one text it is `sequential`'s."""
    branches = [
        {"prompt": title(number), "completion": completion(question)}
        for number, question in enumerate(request.questions, 1)
    ]
    return {"branches": [{"prompt": prompt_of(request), "completion": _OPENING, "branches": branches}]}


def paired(passages: Sequence[Passage], rng: random.Random) -> Iterator[Request]:
    """Two passages in random order, and up to eight questions about both."""
    order = rng.sample(passages, len(passages))
    for one, other in zip(order[::2], order[1::2], strict=False):
        questions = [*one.questions, *other.questions]
        yield Request([one.text, other.text], rng.sample(questions, min(len(questions), QUESTIONS)))


def training_requests(passages: Sequence[Passage]) -> Iterator[Request]:
    """Each passage alone, and in pairs."""
    for passage in passages:
        yield Request([passage.text], passage.questions[:QUESTIONS])
    rng = random.Random(0)
    for _ in range(_PAIRINGS):
        yield from paired(passages, rng)


def write(source: Path, folder: Path) -> list[Request]:
    """Write forking.sequential.jsonl and forking.forking.jsonl; returns the held-out requests."""
    passages = read(source)
    first_held_out = round(len(passages) * (1 - _HELD_OUT))
    requests = list(training_requests(passages[:first_held_out]))
    folder.mkdir(parents=True, exist_ok=True)
    for form in (sequential, forking):
        lines = (json.dumps(form(request), ensure_ascii=False) + "\n" for request in requests)
        (folder / f"forking.{form.__name__}.jsonl").write_text("".join(lines), encoding="utf-8")
    held_out = paired(passages[first_held_out:], random.Random(0))
    return [request for request in held_out if len(request.questions) == QUESTIONS]
