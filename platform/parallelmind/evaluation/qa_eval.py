"""Ask a model the questions of held-out records, score its answers, and count what asking has cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from parallelmind.data.records import Branch, Record, RecordError, parse_line
from parallelmind.engine.model_runner import Model
from parallelmind.engine.request import Sample
from parallelmind.errors import UserError
from parallelmind.evaluation.backends import BACKENDS, Answer, BackendName, generate_samples
from parallelmind.evaluation.qa_metrics import exact_match, f1
from parallelmind.model.patch import is_patched
from parallelmind.model.structure import causal_lm
from parallelmind.model.support import assess


@dataclass(frozen=True, slots=True)
class RecordAnswers:
    """One record: passage, and per branch the question, what the model said and what is right.

    tokens: decoded. seconds: to read and to answer. kv_bytes: of keys and values at their most, None where
    unknown.
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
    """exact_match, f1: means over all questions. The rates are by wall clock, reading of passages and prompts
    included.

    tokens_per_second: decoded. peak_kv_bytes: keys and values of what is asked at once, at their most over
    all records.
    """

    questions: int
    exact_match: float
    f1: float
    questions_per_second: float
    tokens_per_second: float
    peak_kv_bytes: int | None


def read_question_records(path: str, limit: int) -> list[Record]:
    """The first `limit` records of a file. Raises UserError unless each is text with prompts and
    completions.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(
            f"data_path={path}: no such file; give parallel JSONL whose branches have prompt and completion"
        )
    found: list[Record] = []
    with open(file, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if len(found) == limit:
                break
            if raw.strip():
                found.append(_question_record(raw, f"data_path={path}:{number}:"))
    if not found:
        raise UserError(f"data_path={path}: holds no record; write one JSON object a line")
    return found


def _question_record(raw: bytes, where: str) -> Record:
    try:
        record = parse_line(raw)
    except RecordError as error:
        raise UserError(f"{where} {error}; mend the line") from error
    if not isinstance(record.main, str) or any(branch.completion is None for branch in record.branches):
        raise UserError(f"{where} has no questions to score; give every branch a prompt and a completion")
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
    """Every record answered, greedily. at_once: questions of a record that are asked together, all by
    default.

    records_at_once: that one engine works on side by side (engine "parallel" alone). Raises UserError where
    the model cannot hold several questions in one sequence.
    """
    size = 1 if engine == "one_by_one" else at_once
    for group in _batched(records, records_at_once):
        pieces = [_pieces(record, size) for record in group]
        flat = [piece for own in pieces for piece in own]
        if engine == "parallel" and any(len(piece.branches) > 1 for piece in flat):
            _refuse_untaught(model)
        started = time.perf_counter()
        if records_at_once > 1:
            said = generate_samples(model, tokenizer, flat, max_new_tokens)
        else:
            said = [BACKENDS[engine](model, tokenizer, piece, max_new_tokens) for piece in flat]
        seconds = (time.perf_counter() - started) / sum(len(piece.branches) for piece in flat)
        answers = iter(said)
        for record, own in zip(group, pieces, strict=True):
            yield _answered(record, [next(answers) for _ in own], seconds * len(record.branches))


def _pieces(record: Record, size: int | None) -> list[Sample]:
    """A record's questions, so many at once; None: all."""
    prompts = [branch.body for branch in record.branches]
    most = len(prompts) if size is None else min(size, len(prompts))
    return [Sample(record.main, prompts[first : first + most]) for first in range(0, len(prompts), most)]


def _answered(record: Record, said: list[Answer], seconds: float) -> RecordAnswers:
    return RecordAnswers(
        main=str(record.main),
        questions=[str(branch.body).strip() for branch in record.branches],
        predictions=[_first_line(text) for piece in said for text in piece.texts],
        references=[_references(branch) for branch in record.branches],
        tokens=sum(piece.tokens for piece in said),
        seconds=seconds,
        kv_bytes=_most([piece.kv_bytes for piece in said]),
    )


def _batched(records: Iterable[Record], size: int) -> Iterator[Sequence[Record]]:
    source = iter(records)
    while group := list(islice(source, size)):
        yield group


def score_answers(answered: Iterable[RecordAnswers]) -> tuple[list[RecordAnswers], Scores]:
    """All answers and their mean scores."""
    items = list(answered)
    pairs = [pair for item in items for pair in zip(item.predictions, item.references, strict=True)]
    seconds = sum(item.seconds for item in items)
    return items, Scores(
        questions=len(pairs),
        exact_match=fmean(exact_match(prediction, references) for prediction, references in pairs),
        f1=fmean(f1(prediction, references) for prediction, references in pairs),
        questions_per_second=len(pairs) / seconds,
        tokens_per_second=sum(item.tokens for item in items) / seconds,
        peak_kv_bytes=_most([item.kv_bytes for item in items]),
    )


def _refuse_untaught(model: Model) -> None:
    """A model without the patch has not been taught to hold branches; one that never could decodes them row
    by row.
    """
    if not is_patched(model) and assess(causal_lm(model)).reason is None:
        raise UserError(
            "engine=parallel: a model without the patch holds one question at a time; set engine=one_by_one or engine=batch"
        )


def _references(branch: Branch) -> list[str]:
    return [text.strip() for text in (branch.completion or "", *branch.references)]


def _most(counts: list[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return max(known) if len(known) == len(counts) else None


def _first_line(text: str) -> str:
    """What counts as the answer: a base model often starts a new line first, and goes on after its answer."""
    return (text.strip().splitlines() or [""])[0].strip()
