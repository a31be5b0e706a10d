"""Records with questions to answer: read them, and check that an evaluation can answer and score them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice

from parallelmind.config import DataConfig
from parallelmind.data.files import file_parts, find_files
from parallelmind.data.lines import read_lines
from parallelmind.data.records import Record, Segment
from parallelmind.data.survey import check_line
from parallelmind.errors import UserError
from parallelmind.evaluation.backends import BackendName


def read_question_records(
    path: str, limit: int, engine: BackendName = "parallel", at_once: int | None = None
) -> list[Record]:
    """Read the first `limit` records of a data path.

    Raises UserError for a record without questions: each branch has a prompt and a completion, or is a
    document without targets beside a reduce with a prompt and a completion. engine, at_once: as in
    `qa_eval.answer_records`; raises UserError for a record that they cannot answer.
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
    _check_readers(records, engine, at_once)
    return records


def questions_of(record: Record) -> dict[str, Segment]:
    """The segments that are answered in pre-order, by place: such as "1", "1.2", "1.reduce" and "reduce"."""
    return {place: segment for place, segment in _places(record) if segment.completion is not None}


def documents_of(record: Record) -> dict[str, str]:
    """By place, the texts that are only read."""
    return {place: str(segment.body) for place, segment in _places(record) if segment.completion is None}


def _places(fork: Record | Segment, prefix: str = "") -> Iterator[tuple[str, Segment]]:
    """Every segment below this one in pre-order, with its place."""
    below = [(str(number), branch) for number, branch in enumerate(fork.branches, start=1)]
    for name, segment in below if fork.reduce is None else [*below, ("reduce", fork.reduce)]:
        yield f"{prefix}{name}", segment
        yield from _places(segment, f"{prefix}{name}.")


def _check_questions(record: Record | str, location: str) -> Record:
    """The record. Raises UserError for a reason why it is none, and for one that cannot be answered."""
    if isinstance(record, str):
        raise UserError(f"{location} {record}; correct the line")
    segments = list(record.walk())
    documents = [segment for segment in segments if segment.completion is None]
    scored = len(documents) < len(segments) and not (record.is_flat and documents)
    reduce_is_read = record.reduce is None or record.reduce.completion is not None or record.reduce.branches
    if not scored or not reduce_is_read or any(document.targets for document in documents):
        raise _no_questions(location)
    if any(isinstance(text, list) for text in (record.main, *(segment.body for segment in segments))):
        raise _no_questions(location)
    return record


def _no_questions(location: str) -> UserError:
    return UserError(
        f"{location} has no questions to score; give every branch a prompt and a completion, "
        "or give both to a reduce beside branches that are texts with targets=[]"
    )


def _check_readers(records: Sequence[Record], engine: BackendName, at_once: int | None) -> None:
    """Raise UserError if a segment reads answers that are not decoded in its sequence."""
    if engine == "parallel" and at_once is None:
        return
    if any(segment.branches for record in records for segment in record.walk()):
        raise UserError(
            f"engine={engine} at_once={'null' if at_once is None else at_once}: data_path has nested "
            "branches, which read the answers before them; set engine=parallel at_once=null"
        )
    if any(record.reduce and len(questions_of(record)) > 1 for record in records):
        raise UserError(
            f"engine={engine} at_once={'null' if at_once is None else at_once}: data_path has a reduce that "
            "reads the answers of all branches; set engine=parallel at_once=null"
        )
