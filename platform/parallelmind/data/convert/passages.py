"""Questions about passages, as SQuAD and HotpotQA write them: the passage is main, its questions are the
branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from parallelmind.data.convert.items import Bad, Converted, Item, checked_text, text_at
from parallelmind.data.records import RecordError


@dataclass(frozen=True, slots=True)
class Wording:
    """How a question becomes a prompt, and its answer a completion."""

    question: str
    answer: str

    def pair(self, question: str, answer: str, others: Iterable[str] = ()) -> Converted:
        """others: answers that are right as well; the branch names them only where they differ."""
        # By replacement: other braces in a template are text.
        prompt = self.question.replace("{question}", question.strip())
        completion, *rest = dict.fromkeys(
            self.answer.replace("{answer}", text.strip()) for text in (answer, *others)
        )
        return {"prompt": prompt, "completion": completion, **({"references": rest} if rest else {})}


@dataclass(frozen=True, slots=True)
class Asked:
    """One question of a passage; branch is None where the source has no answer to it."""

    passage: str
    branch: Converted | None


def paragraphs(items: Iterable[Item | Bad]) -> Iterator[Item | Bad]:
    """Articles as their paragraphs; every other item as it is."""
    for item in items:
        if (
            isinstance(item, Item)
            and isinstance(item.value, dict)
            and isinstance(item.value.get("paragraphs"), list)
        ):
            for index, paragraph in enumerate(item.value["paragraphs"]):
                yield Item(f"{item.place}.paragraphs[{index}]", paragraph)
        else:
            yield item


def asked(value: Any, wording: Wording) -> Iterator[Asked]:
    """The questions of a paragraph with `qas`, or the one of a row with question and answer(s). Raises
    RecordError.
    """
    if not isinstance(value, dict) or not value.get("context"):
        raise RecordError("has no context")
    passage = _passage(value["context"])
    if "qas" not in value:
        yield Asked(passage, _branch(value, "", wording))
        return
    if not isinstance(value["qas"], list) or not value["qas"]:
        raise RecordError("qas is no list of questions")
    for index, question in enumerate(value["qas"]):
        yield Asked(passage, _branch(question, f"qas[{index}]", wording))


def _branch(value: Any, where: str, wording: Wording) -> Converted | None:
    question = text_at(value, "question", where)
    answers = _answers(value, where)
    if not answers:
        return None
    name = f"{where}.answers".lstrip(".")
    return wording.pair(question, checked_text(answers[0], name), _usable(answers[1:], name))


def _usable(answers: Iterable[Any], name: str) -> Iterator[str]:
    """What is text among the answers beside the first: a record is not bad for want of a second one."""
    for text in answers:
        with suppress(RecordError):
            yield checked_text(text, name)


def _answers(value: dict[str, Any], where: str) -> list[Any]:
    """Texts, from a text, a list of texts, a list of {"text"} or {"text": a list}."""
    given = value["answers"] if "answers" in value else value.get("answer")
    if isinstance(given, dict):
        given = given.get("text")
    if given is None:
        raise RecordError(f"{where or 'record'} has neither answers nor answer")
    found = given if isinstance(given, list) else [given]
    return [item.get("text") if isinstance(item, dict) else item for item in found]


def _passage(context: Any) -> str:
    """A text as it is; titles with sentences as one paragraph each, be they pairs or two columns."""
    if isinstance(context, str):
        return checked_text(context, "context")
    try:
        pairs = (
            zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
        )
        return checked_text("\n".join(_paragraph(title, sentences) for title, sentences in pairs), "context")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError("context is neither a text nor titles with their sentences") from error


def _paragraph(title: str, sentences: list[str]) -> str:
    if not isinstance(sentences, list):
        raise TypeError
    return f"{title}: " + " ".join(sentence.strip() for sentence in map(str, sentences))


def grouped(found: Iterable[Asked | Bad], everywhere: bool) -> Iterator[Converted | Bad]:
    """One record for each passage: of questions that follow one another, or of all, which are then held in
    memory.

    Passages stay in the order in which they first come; questions without an answer must be gone.
    """
    held: dict[str, list[Converted]] = {}
    for item in found:
        if isinstance(item, Bad):
            yield item
            continue
        if not everywhere and item.passage not in held:
            yield from _records(held)
            held = {}
        held.setdefault(item.passage, []).extend([item.branch] if item.branch else [])
    yield from _records(held)


def _records(held: dict[str, list[Converted]]) -> Iterator[Converted]:
    return ({"main": passage, "branches": branches} for passage, branches in held.items() if branches)
