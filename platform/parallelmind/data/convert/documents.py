"""Questions about documents: they are the documents of a record, and the question stands in the reduce."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from parallelmind.data.convert.passages import PassageQuestion
from parallelmind.data.convert.source_records import BadRecord, ParallelRecord


def group_by_source(
    questions: Iterable[PassageQuestion | BadRecord], documents: int | None
) -> Iterator[ParallelRecord | BadRecord]:
    """As `group_by_article`, with documents of the whole source, in random order."""
    merged = (
        question if isinstance(question, BadRecord) else replace(question, article=None)
        for question in questions
    )
    for record in group_by_article(merged, True, documents):
        if not isinstance(record, BadRecord):
            random.Random(str(record["reduce"])).shuffle(record["documents"])
        yield record


def group_by_article(
    questions: Iterable[PassageQuestion | BadRecord], all_questions: bool, documents: int | None
) -> Iterator[ParallelRecord | BadRecord]:
    """One record per question, with documents of its article.

    all_questions: gather all questions of an article, which holds the whole source in memory; otherwise
    consecutive ones. documents: number of documents per record; None: all of the article.
    """
    articles: dict[object, list[PassageQuestion]] = {}
    for question in questions:
        if isinstance(question, BadRecord):
            yield question
            continue
        if not all_questions and question.article not in articles:
            yield from _records(articles, documents)
            articles = {}
        articles.setdefault(question.article, []).append(question)
    yield from _records(articles, documents)


def _records(articles: dict[object, list[PassageQuestion]], number: int | None) -> Iterator[ParallelRecord]:
    for questions in articles.values():
        article = list(dict.fromkeys(text for question in questions for text in question.documents))
        for question in questions:
            if question.branch:
                texts = _with_distractors(article, question, number or len(article))
                yield {"main": "", "documents": texts, "reduce": question.branch}


def _with_distractors(article: Sequence[str], question: PassageQuestion, number: int) -> list[str]:
    """The question's own documents and others that fill up the number, in the order of the article.

    The draw depends on the text of the question alone.
    """
    others = [text for text in article if text not in question.documents]
    draw = random.Random(str(question.branch)).sample
    drawn = draw(others, min(len(others), max(number - len(question.documents), 0)))
    return [text for text in article if text in question.documents or text in drawn]
