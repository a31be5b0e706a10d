"""Answer the questions of held-out records and score the answers, with speed and memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from parallelmind.data.records import Record, Segment
from parallelmind.engine.model_runner import Model
from parallelmind.engine.record_prompt import RecordPrompt
from parallelmind.engine.request import Sample
from parallelmind.errors import UserError
from parallelmind.evaluation.backends import BACKENDS, Answer, BackendName, generate_samples
from parallelmind.evaluation.qa_metrics import exact_match, f1
from parallelmind.evaluation.qa_records import documents_of, questions_of
from parallelmind.model.patch_state import is_patched
from parallelmind.model.structure import causal_lm
from parallelmind.model.support import assess


@dataclass(frozen=True, slots=True)
class RecordAnswers:
    """Answers to the questions of one record.

    main: the passage. documents: by place, the texts that are only read. places, questions, predictions,
    references: one entry per question. A place is the number of a branch, from 1, or "reduce"; "1.2" is the
    second branch of branch 1, and "1.reduce" its reduce. tokens: decoded tokens. seconds: time to read the
    prompts and to decode. kv_bytes: peak size of keys and values; None if unknown.
    """

    main: str
    documents: dict[str, str]
    places: list[str]
    questions: list[str]
    predictions: list[str]
    references: list[list[str]]
    tokens: int
    seconds: float
    kv_bytes: int | None


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores over all records.

    exact_match, f1: means over all questions. questions_per_second, tokens_per_second: wall-clock rates,
    prompts included; tokens are the decoded ones. peak_kv_bytes: largest size of keys and values over all
    records; None if unknown.
    """

    questions: int
    exact_match: float
    f1: float
    questions_per_second: float
    tokens_per_second: float
    peak_kv_bytes: int | None


def answer_records(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    records: Iterable[Record],
    *,
    engine: BackendName = "parallel",
    at_once: int | None = None,
    records_at_once: int = 1,
    max_new_tokens: int,
) -> Iterator[RecordAnswers]:
    """Answer the questions of every record greedily.

    at_once: questions of a record that are decoded together; None means all. records_at_once: records that
    one engine decodes concurrently, for engine="parallel" only. Other engines read documents one after
    another, as a plain text. Raises UserError if the model cannot hold several branches in one sequence.
    """
    questions_per_sample = 1 if engine == "one_by_one" else at_once
    for group in _batched(records, records_at_once):
        prompts_by_record = [_prompts(record, tokenizer, engine, questions_per_sample) for record in group]
        prompts = [prompt for record_prompts in prompts_by_record for prompt in record_prompts]
        if engine == "parallel" and any(prompt.num_outputs > 1 for prompt in prompts):
            _require_branches(model, not all(record.is_flat for record in group))
        started = time.perf_counter()
        if records_at_once > 1:
            answers = generate_samples(model, tokenizer, prompts, max_new_tokens)
        else:
            answers = [BACKENDS[engine](model, tokenizer, prompt, max_new_tokens) for prompt in prompts]
        num_questions = sum(len(prompt.decoded) for prompt in prompts)
        seconds_per_question = (time.perf_counter() - started) / num_questions
        remaining = iter(answers)
        for record, record_prompts in zip(group, prompts_by_record, strict=True):
            answered = [(prompt, next(remaining)) for prompt in record_prompts]
            yield _merge_answers(record, answered, seconds_per_question * len(questions_of(record)))


def score_answers(answered: Iterable[RecordAnswers]) -> tuple[list[RecordAnswers], Scores]:
    """Collect the answers and compute their scores."""
    records = list(answered)
    pairs = [pair for record in records for pair in zip(record.predictions, record.references, strict=True)]
    seconds = sum(record.seconds for record in records)
    return records, Scores(
        questions=len(pairs),
        exact_match=fmean(exact_match(prediction, references) for prediction, references in pairs),
        f1=fmean(f1(prediction, references) for prediction, references in pairs),
        questions_per_second=len(pairs) / seconds,
        tokens_per_second=sum(record.tokens for record in records) / seconds,
        peak_kv_bytes=_max_or_none([record.kv_bytes for record in records]),
    )


def _batched(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    source = iter(records)
    while group := list(islice(source, size)):
        yield group


def _prompts(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    engine: BackendName,
    questions_per_sample: int | None,
) -> list[RecordPrompt]:
    """Prompts with main and up to `questions_per_sample` questions each; None means all.

    A tree is one sample.
    """
    prompt = RecordPrompt.of(record, tokenizer)
    if not record.is_flat:
        return [prompt if engine == "parallel" else _plain_prompt(record)]
    main, questions = prompt.sample.main, prompt.sample.branches
    size = min(questions_per_sample or len(questions), len(questions))
    firsts = range(0, len(questions), size)
    return [RecordPrompt(Sample(main, questions[first : first + size])) for first in firsts]


def _plain_prompt(record: Record) -> RecordPrompt:
    """Main, documents and question as one plain text."""
    assert record.reduce is not None, "documents stand beside a question in the reduce"
    texts = [str(record.main), *documents_of(record).values(), str(record.reduce.body)]
    return RecordPrompt(Sample(branches=["".join(texts)]))


def _require_branches(model: Model, has_tree: bool) -> None:
    """Raise UserError for a model that could be patched but is not.

    A model that cannot be patched decodes each branch in its own row, and no tree.
    """
    if is_patched(model):
        return
    reason = assess(causal_lm(model)).reason
    if reason is None or has_tree:
        why = reason or "is not patched, and holds one question at a time"
        raise UserError(f"engine=parallel: the model {why}; set engine=one_by_one or engine=batch")


def _merge_answers(
    record: Record, answered: Sequence[tuple[RecordPrompt, Answer]], seconds: float
) -> RecordAnswers:
    questions = questions_of(record)
    texts = [answer.texts[index] for prompt, answer in answered for index in prompt.decoded]
    return RecordAnswers(
        main=str(record.main),
        documents=documents_of(record),
        places=list(questions),
        questions=[str(question.body).strip() for question in questions.values()],
        predictions=[_first_line(text) for text in texts],
        references=[_references(question) for question in questions.values()],
        tokens=sum(answer.tokens for _, answer in answered),
        seconds=seconds,
        kv_bytes=_max_or_none([answer.kv_bytes for _, answer in answered]),
    )


def _references(question: Segment) -> list[str]:
    return [text.strip() for text in (question.completion or "", *question.references)]


def _first_line(text: str) -> str:
    """The first non-blank line. Base models often start with a newline and continue after the answer."""
    return (text.strip().splitlines() or [""])[0].strip()


def _max_or_none(values: list[int | None]) -> int | None:
    """The maximum, or None if any value is unknown."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None
