"""Records with questions to answer: read them, and check that an evaluation can answer and score them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice

from parallelmind.config import DataConfig
from parallelmind.data.files import file_parts, find_files
from parallelmind.data.lines import read_lines
from parallelmind.data.records import Record, RecordError, Segment
from parallelmind.data.survey import check_line
from parallelmind.engine.record_prompt import check_depth
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
    """The segments that are answered, by place: the number of a branch, or "reduce", which is the last."""
    segments = {str(number): branch for number, branch in enumerate(record.branches)}
    if record.reduce is not None:
        segments["reduce"] = record.reduce
    return {place: segment for place, segment in segments.items() if segment.completion is not None}


def documents_of(record: Record) -> dict[int, str]:
    """By branch, the texts that are only read."""
    numbered = enumerate(record.branches)
    return {number: str(branch.body) for number, branch in numbered if branch.completion is None}


def _check_questions(record: Record | str, location: str) -> Record:
    """The record. Raises UserError for a reason why it is none, and for one that cannot be answered."""
    if isinstance(record, str):
        raise UserError(f"{location} {record}; correct the line")
    try:
        check_depth(record)
    except RecordError as error:
        raise UserError(f"{location} {error}") from error
    documents = [branch for branch in record.branches if branch.completion is None]
    scored = record.reduce.completion is not None if record.reduce else not documents
    if not scored or any(document.targets for document in documents) or _holds_ids(record):
        raise UserError(
            f"{location} has no questions to score; give every branch a prompt and a completion, "
            "or give both to a reduce beside branches that are texts with targets=[]"
        )
    return record


def _holds_ids(record: Record) -> bool:
    """Whether a text of the record is given as token ids."""
    return any(isinstance(text, list) for text in (record.main, *(branch.body for branch in record.branches)))


def _check_readers(records: Sequence[Record], engine: BackendName, at_once: int | None) -> None:
    """Raise UserError if a reduce reads answers that are not decoded in its sequence."""
    if engine == "parallel" and at_once is None:
        return
    if any(record.reduce and len(questions_of(record)) > 1 for record in records):
        raise UserError(
            f"engine={engine} at_once={'null' if at_once is None else at_once}: data_path has a reduce that "
            "reads the answers of all branches; set engine=parallel at_once=null"
        )
