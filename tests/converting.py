"""Convert source records with the tiny tokenizer, and check that every result is a record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tiny import tiny_tokenizer

from parallelmind.data.convert.converter import Converter
from parallelmind.data.convert.settings import ConvertSettings
from parallelmind.data.convert.source_records import BadRecord, SourceRecord
from parallelmind.data.record_parser import parse_value

TOKENIZER = tiny_tokenizer()


def convert(values: list[Any], **settings: Any) -> list[dict[str, Any] | BadRecord]:
    """The results of the source records, each checked to be a record of parallel JSONL or a BadRecord."""
    converter = Converter(ConvertSettings.model_validate(settings), lambda: TOKENIZER)
    records = (SourceRecord(str(index), value) for index, value in enumerate(values))
    results = list(converter.convert_records(records))
    for result in results:
        if not isinstance(result, BadRecord):
            assert parse_value(result).unknown_keys == ()
    return results


def convert_one(value: Any, **settings: Any) -> dict[str, Any]:
    """The only record of a source record."""
    (record,) = convert([value], **settings)
    assert isinstance(record, dict), record
    return record


def bad_reason(value: Any, **settings: Any) -> str:
    """Why the source record cannot be converted."""
    (result,) = convert([value], **settings)
    assert isinstance(result, BadRecord)
    return result.reason


def segment_texts(segment: dict[str, Any]) -> Iterator[str]:
    """The texts of a segment and of what follows it, in order."""
    yield segment["text"] if "text" in segment else segment["prompt"] + segment["completion"]
    for branch in segment.get("branches", ()):
        yield from segment_texts(branch)
    if "reduce" in segment:
        yield from segment_texts(segment["reduce"])
