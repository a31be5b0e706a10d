"""Questions about passages, as in SQuAD and HotpotQA: the passage is main, its questions are the branches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from parallelmind.data.convert.conversation import check_not_python, json_or_text
from parallelmind.data.convert.source_records import (
    BadRecord,
    ParallelRecord,
    SourceRecord,
    check_text,
    is_blank,
    required_text,
)
from parallelmind.data.records import RecordError


@dataclass(frozen=True, slots=True)
class QuestionTemplates:
    """Templates that turn a question into a prompt and its answer into a completion."""

    question: str
    answer: str

    def branch(self, question: str, answer: str, other_answers: Iterable[str] = ()) -> ParallelRecord:
        """A branch with prompt and completion. Other correct answers become its references, once each."""
        # str.replace instead of str.format: other braces in a template are text.
        prompt = self.question.replace("{question}", question.strip())
        completion, *references = dict.fromkeys(
            self.answer.replace("{answer}", text.strip()) for text in (answer, *other_answers)
        )
        branch: ParallelRecord = {"prompt": prompt, "completion": completion}
        return {**branch, "references": references} if references else branch


@dataclass(frozen=True, slots=True)
class PassageQuestion:
    """One question about one or more documents.

    branch: None if the source has no answer to the question. article: key that questions about the same
    collection of documents share.
    """

    documents: tuple[str, ...]
    branch: ParallelRecord | None
    article: object

    @property
    def passage(self) -> str:
        """The documents as one text, with a line for each."""
        return "\n".join(self.documents)


def expand_articles(
    records: Iterable[SourceRecord | BadRecord],
) -> Iterator[SourceRecord | BadRecord]:
    """Replace articles by their paragraphs, which get the location of the article as their title.

    All other records stay as they are.
    """
    for record in records:
        value = record.value if isinstance(record, SourceRecord) else None
        if isinstance(value, dict) and isinstance(value.get("paragraphs"), list):
            for index, paragraph in enumerate(value["paragraphs"]):
                if isinstance(paragraph, dict):
                    paragraph = {**paragraph, "title": record.location}
                yield SourceRecord(f"{record.location}.paragraphs[{index}]", paragraph)
        else:
            yield record


def passage_questions(value: Any, templates: QuestionTemplates) -> Iterator[PassageQuestion]:
    """The questions of a paragraph with `qas`, or the one question of a row. Raises RecordError."""
    context = (value.get("context") or value.get("documents")) if isinstance(value, dict) else None
    if not context:
        raise RecordError("has no context")
    documents = tuple(_documents(context))
    if not documents:
        raise RecordError("context is empty")
    title = value.get("title") if isinstance(context, str) else None
    article = documents if is_blank(title) else str(title)
    if "qas" not in value:
        yield PassageQuestion(documents, _branch(value, "", templates), article)
        return
    if not isinstance(value["qas"], list) or not value["qas"]:
        raise RecordError("qas is not a list of questions")
    for index, question in enumerate(value["qas"]):
        yield PassageQuestion(documents, _branch(question, f"qas[{index}]", templates), article)


def _branch(value: Any, where: str, templates: QuestionTemplates) -> ParallelRecord | None:
    question = required_text(value, "question", where)
    answers = _answers(value, where)
    if not answers:
        return None
    name = f"{where}.answers".lstrip(".")
    return templates.branch(question, check_text(answers[0], name), _valid_texts(answers[1:], name))


def _valid_texts(answers: Iterable[Any], name: str) -> Iterator[str]:
    """The answers that are text. A record is not bad because its second answer is."""
    for text in answers:
        with suppress(RecordError):
            yield check_text(text, name)


def _answers(value: dict[str, Any], where: str) -> list[Any]:
    """The answers, given as a text, a list of texts, a list of {"text"}, or {"text": a list}."""
    answers = _parse_answers_text(value["answers"]) if "answers" in value else value.get("answer")
    if isinstance(answers, dict):
        answers = answers.get("text")
    if answers is None:
        raise RecordError(f"{where or 'record'} has neither answers nor answer")
    answer_list = answers if isinstance(answers, list) else [answers]
    return [answer.get("text") if isinstance(answer, dict) else answer for answer in answer_list]


def _parse_answers_text(answers: Any) -> Any:
    """The answers in a JSON text, as a column of CSV has them; any other value as it is."""
    if not isinstance(answers, str):
        return answers
    check_not_python(answers, "answers")
    parsed = json_or_text(answers)
    are_answers = isinstance(parsed, list) and all(isinstance(item, str | dict) for item in parsed)
    return parsed if are_answers or isinstance(parsed, dict) else answers


def _parse_titles(context: str) -> Any:
    """Titles with sentences in a JSON text, as a column of CSV has them; None for any other text."""
    if not context.lstrip().startswith(("[", "{")):
        return None
    parsed = json_or_text(context)
    is_table = isinstance(parsed, dict) and parsed.keys() >= {"title", "sentences"}
    are_pairs = isinstance(parsed, list) and bool(parsed) and all(isinstance(pair, list) for pair in parsed)
    return parsed if is_table or are_pairs else None


def _documents(context: Any) -> list[str]:
    """The context as one text, a list of texts, or titles with sentences, as pairs or in two columns."""
    if isinstance(context, str):
        titles = _parse_titles(context)
        if titles is None:
            return [check_text(context, "context")]
        context = titles
    if isinstance(context, list) and isinstance(context[0], str):
        return [check_text(text, "documents") for text in context]
    try:
        pairs = context
        if isinstance(context, dict):
            pairs = zip(context["title"], context["sentences"], strict=True)
        return [check_text(_document(title, sentences), "context") for title, sentences in pairs]
    except RecordError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError("context is neither a text nor titles with their sentences") from error


def _document(title: str, sentences: list[str]) -> str:
    if not isinstance(sentences, list):
        raise TypeError
    return f"{title}: " + " ".join(sentence.strip() for sentence in map(str, sentences))


def group_by_passage(
    questions: Iterable[PassageQuestion | BadRecord], all_questions: bool
) -> Iterator[ParallelRecord | BadRecord]:
    """One record per passage, in the order of the passages.

    all_questions: group all questions of a passage, which holds the whole source in memory; otherwise group
    consecutive ones. Questions without a branch are ignored.
    """
    branches: dict[str, list[ParallelRecord]] = {}  # by passage
    for question in questions:
        if isinstance(question, BadRecord):
            yield question
            continue
        if not all_questions and question.passage not in branches:
            yield from _passage_records(branches)
            branches = {}
        branches.setdefault(question.passage, []).extend([question.branch] if question.branch else [])
    yield from _passage_records(branches)


def _passage_records(branches: dict[str, list[ParallelRecord]]) -> Iterator[ParallelRecord]:
    return ({"main": passage, "branches": items} for passage, items in branches.items() if items)
