"""Answer the questions of held-out records and score the answers, with speed and memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from parallelmind.config import DataConfig
from parallelmind.data.files import file_parts, find_files
from parallelmind.data.lines import read_lines
from parallelmind.data.records import Record, Segment
from parallelmind.data.survey import check_line
from parallelmind.engine.model_runner import Model
from parallelmind.engine.request import Sample
from parallelmind.errors import UserError
from parallelmind.evaluation.backends import BACKENDS, Answer, BackendName, generate_samples
from parallelmind.evaluation.qa_metrics import exact_match, f1
from parallelmind.model.patch_state import is_patched
from parallelmind.model.structure import causal_lm
from parallelmind.model.support import assess


@dataclass(frozen=True, slots=True)
class RecordAnswers:
    """Answers to the questions of one record.

    main: the passage. questions, predictions, references: one entry per branch. tokens: decoded tokens.
    seconds: time to read the prompts and to decode. kv_bytes: peak size of keys and values; None if unknown.
    """

    main: str
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


def read_question_records(path: str, limit: int) -> list[Record]:
    """Read the first `limit` records of a data path.

    Raises UserError unless every record is text and every branch has a prompt and a completion.
    """
    config = DataConfig(data_path=path)
    checked = (
        (f"data_path={file}:{number}:", check_line(line, config, None))
        for file in find_files(path)
        for number, line in enumerate(chain.from_iterable(map(read_lines, file_parts([file]))), start=1)
    )
    questions = (_check_questions(record, location) for location, record in checked if record is not None)
    records = list(islice(questions, limit))
    if not records:
        raise UserError(f"data_path={path}: holds no record; write one JSON object per line")
    return records


def _check_questions(record: Record | str, location: str) -> Record:
    """The record. Raises UserError for a reason why it is none, and for one that holds no questions."""
    if isinstance(record, str):
        raise UserError(f"{location} {record}; correct the line")
    if not isinstance(record.main, str) or any(branch.completion is None for branch in record.branches):
        raise UserError(f"{location} has no questions to score; give every branch a prompt and a completion")
    return record


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
    one engine decodes concurrently, for engine="parallel" only. Raises UserError if the model cannot hold
    several questions in one sequence.
    """
    questions_per_sample = 1 if engine == "one_by_one" else at_once
    for group in _batched(records, records_at_once):
        samples_by_record = [_split_record(record, questions_per_sample) for record in group]
        samples = [sample for record_samples in samples_by_record for sample in record_samples]
        if engine == "parallel" and any(len(sample.branches) > 1 for sample in samples):
            _require_branches(model)
        started = time.perf_counter()
        if records_at_once > 1:
            answers = generate_samples(model, tokenizer, samples, max_new_tokens)
        else:
            answers = [BACKENDS[engine](model, tokenizer, sample, max_new_tokens) for sample in samples]
        seconds_per_question = (time.perf_counter() - started) / sum(
            len(sample.branches) for sample in samples
        )
        remaining = iter(answers)
        for record, record_samples in zip(group, samples_by_record, strict=True):
            record_answers = [next(remaining) for _ in record_samples]
            yield _merge_answers(record, record_answers, seconds_per_question * len(record.branches))


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


def _split_record(record: Record, questions_per_sample: int | None) -> list[Sample]:
    """Samples with main and up to `questions_per_sample` questions each; None means all."""
    prompts = [branch.body for branch in record.branches]
    size = len(prompts) if questions_per_sample is None else min(questions_per_sample, len(prompts))
    return [Sample(record.main, prompts[first : first + size]) for first in range(0, len(prompts), size)]


def _require_branches(model: Model) -> None:
    """Raise UserError for a model that could be patched but is not.

    A model that cannot be patched decodes each branch in its own row.
    """
    if not is_patched(model) and assess(causal_lm(model)).reason is None:
        raise UserError(
            "engine=parallel: a model without the patch holds one question at a time; "
            "set engine=one_by_one or engine=batch"
        )


def _merge_answers(record: Record, answers: list[Answer], seconds: float) -> RecordAnswers:
    return RecordAnswers(
        main=str(record.main),
        questions=[str(branch.body).strip() for branch in record.branches],
        predictions=[_first_line(text) for answer in answers for text in answer.texts],
        references=[_references(branch) for branch in record.branches],
        tokens=sum(answer.tokens for answer in answers),
        seconds=seconds,
        kv_bytes=_max_or_none([answer.kv_bytes for answer in answers]),
    )


def _references(branch: Segment) -> list[str]:
    return [text.strip() for text in (branch.completion or "", *branch.references)]


def _first_line(text: str) -> str:
    """The first non-blank line. Base models often start with a newline and continue after the answer."""
    return (text.strip().splitlines() or [""])[0].strip()


def _max_or_none(values: list[int | None]) -> int | None:
    """The maximum, or None if any value is unknown."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None
