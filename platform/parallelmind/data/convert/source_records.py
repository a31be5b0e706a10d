"""Source records with their location, and the checks that every kind of source shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from parallelmind.data.records import RecordError, check_surrogates

ParallelRecord = dict[str, Any]  # one record of parallel JSONL

ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One record of a source. location: file and line or index, as shown to the user."""

    location: str
    value: Any


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A source record that cannot be converted, and the reason."""

    location: str
    reason: str

    def __str__(self) -> str:
        return f"{self.location}: {self.reason}"


def convert_each(
    records: Iterable[SourceRecord | BadRecord], convert: Callable[[Any], Iterable[ResultT]]
) -> Iterator[ResultT | BadRecord]:
    """All results of `convert` for every record, or one BadRecord if it raises RecordError."""
    for record in records:
        if isinstance(record, BadRecord):
            yield record
            continue
        try:
            results = list(convert(record.value))
        except RecordError as error:
            yield BadRecord(record.location, str(error))
            continue
        yield from results


def required_text(value: Any, key: str, where: str = "") -> str:
    """The text under a key of an object. Raises RecordError if it is missing or blank.

    where: name of the object in the error.
    """
    if not isinstance(value, dict):
        raise RecordError(f"{where or 'record'} is not a JSON object")
    name = f"{where}.{key}" if where else key
    if value.get(key) is None:
        raise RecordError(f"has no {name}")
    return check_text(value[key], name)


def check_text(text: Any, name: str) -> str:
    """Return `text` if it can be tokenised and trained on. Otherwise raise RecordError with `name`."""
    if not isinstance(text, str):
        raise RecordError(f"{name} is not text")
    if not text.strip():
        raise RecordError(f"{name} is empty")
    check_surrogates(text, name)
    return text


def is_blank(value: Any) -> bool:
    """Whether a value is missing: null, an empty list, or a text without a character."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())
