"""Prompts of validation records, which the manifest holds as samples for the page of a server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from parallelmind.data.files import file_parts
from parallelmind.data.lines import Line, read_lines
from parallelmind.data.record_parser import parse_line, parse_value
from parallelmind.data.records import Record, RecordError
from parallelmind.engine.record_prompt import RecordPrompt
from parallelmind.engine.request import Sample, Segment, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_LINES = 256  # that are looked at
_MAX_BRANCHES = 4  # of main; further ones are left out
_MAX_CHARS = 4000  # of a sample as JSON


def read_samples(
    files: Sequence[str], count: int, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The prompts of the first records that are short and hold text alone, as bodies of /v1/branches."""
    lines = (line for part in file_parts(files) for line in read_lines(part))
    records = filter(None, map(_parse, islice(lines, _MAX_LINES)))
    shown = (_shortened(record) for record in records if not record.documents)  # the page has no documents
    samples = (_sample(RecordPrompt.of(record, tokenizer)) for record in shown)
    return list(islice((sample for sample in samples if _is_short_text(sample)), count))


def _parse(line: Line) -> Record | None:
    try:
        if line.value is not None:
            return parse_value(line.value)
        return parse_line(line.raw) if line.raw and line.raw.strip() else None
    except RecordError:
        return None


def _shortened(record: Record) -> Record:
    """A record with fewer branches, unless it has a reduce that reads them."""
    if record.reduce is not None:
        return record
    return Record(record.main, record.branches[:_MAX_BRANCHES], record.standalone)


def _sample(prompt: RecordPrompt) -> dict[str, Any]:
    indices = iter(range(prompt.num_outputs))
    return {"main": prompt.sample.main, **_below(prompt.sample, indices, prompt.documents)}


def _below(fork: Sample | Segment, indices: Iterator[int], documents: Mapping[int, Text]) -> dict[str, Any]:
    """Branches and reduce of a segment. indices: of the segments from its first branch on."""
    body: dict[str, Any] = {}
    if fork.branches:
        body["branches"] = [_segment(branch, indices, documents) for branch in fork.branches]
    if fork.reduce is not None:
        body["reduce"] = _segment(fork.reduce, indices, documents)
    return body


def _segment(given: Text | Segment, indices: Iterator[int], documents: Mapping[int, Text]) -> dict[str, Any]:
    segment = given if isinstance(given, Segment) else Segment(given)
    index = next(indices)
    read_only = {"text": documents[index], "max_tokens": 0} if index in documents else {"text": segment.text}
    return {**read_only, **_below(segment, indices, documents)}


def _is_short_text(sample: dict[str, Any]) -> bool:
    """Whether a sample has branches, and neither token ids nor too many characters."""
    text = json.dumps(sample, ensure_ascii=False)
    return "branches" in sample and len(text) <= _MAX_CHARS and not _holds_ids(sample)


def _holds_ids(fork: dict[str, Any]) -> bool:
    below = [*fork.get("branches", []), *([fork["reduce"]] if "reduce" in fork else [])]
    own = fork["text"] if "text" in fork else fork["main"]
    return not isinstance(own, str) or any(_holds_ids(segment) for segment in below)
