"""Ask a model the questions of held-out records, all questions of a passage in one sequence, and score its answers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from parallelmind.data.records import Record, RecordError, parse_line
from parallelmind.decoding.forward import Model
from parallelmind.decoding.generate import stream
from parallelmind.decoding.samples import Sample
from parallelmind.errors import UserError
from parallelmind.evaluation.answers import exact_match, f1


@dataclass(frozen=True, slots=True)
class Answered:
    """One record: passage, and per branch the question, what the model said and what it should have said."""

    main: str
    questions: list[str]
    predictions: list[str]
    references: list[str]


@dataclass(frozen=True, slots=True)
class Scores:
    """Means over all questions. tokens_per_second: decoded tokens by wall clock, prompts included in the time."""

    questions: int
    exact_match: float
    f1: float
    tokens_per_second: float


def question_records(path: str, limit: int) -> list[Record]:
    """The first `limit` records of a file. Raises UserError unless each is text with prompts and completions."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"data_path={path}: no such file; give parallel JSONL whose branches have prompt and completion")
    found: list[Record] = []
    with open(file, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if len(found) == limit:
                break
            if raw.strip():
                found.append(_question_record(raw, f"data_path={path}: line {number}"))
    if not found:
        raise UserError(f"data_path={path}: holds no record; write one JSON object per line")
    return found


def _question_record(raw: bytes, where: str) -> Record:
    try:
        record = parse_line(raw)
    except RecordError as error:
        raise UserError(f"{where} {error}; mend the line") from error
    if not isinstance(record.main, str) or any(branch.completion is None for branch in record.branches):
        raise UserError(f"{where} has no questions to score; give every branch a prompt and a completion")
    return record


def answer(
    model: Model, tokenizer: PreTrainedTokenizerBase, records: Iterable[Record], **sampling: Any
) -> Iterator[tuple[Answered, int, float]]:
    """Every record answered, with the tokens decoded and the seconds it took. sampling: fields of `SamplingParams`."""
    for record in records:
        sample = Sample(record.main, [branch.body for branch in record.branches])
        texts, tokens, start = [""] * len(record.branches), 0, time.perf_counter()
        for event in stream(model, tokenizer, sample, **sampling):
            texts[event.branch] += event.text
            tokens += 1
        yield _answered(record, texts), tokens, time.perf_counter() - start


def score(answered: Iterable[tuple[Answered, int, float]]) -> tuple[list[Answered], Scores]:
    """All answers and their mean scores."""
    items, tokens, seconds = map(list, zip(*answered, strict=True))
    pairs = [pair for item in items for pair in zip(item.predictions, item.references, strict=True)]
    exact = fmean(exact_match(prediction, [reference]) for prediction, reference in pairs)
    overlap = fmean(f1(prediction, [reference]) for prediction, reference in pairs)
    return items, Scores(len(pairs), exact, overlap, sum(tokens) / sum(seconds))


def _answered(record: Record, texts: list[str]) -> Answered:
    questions = [branch.body.strip() if isinstance(branch.body, str) else "" for branch in record.branches]
    references = [(branch.completion or "").strip() for branch in record.branches]
    return Answered(str(record.main), questions, [_first_line(text) for text in texts], references)


def _first_line(text: str) -> str:
    """What counts as the answer: a base model often starts a new line first, and goes on after its answer."""
    return (text.strip().splitlines() or [""])[0].strip()
