"""Source records, each with its place, and what makes a record bad whatever its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from parallelmind.data.records import RecordError, check_surrogates

Converted = dict[str, Any]  # one record of parallel JSONL

MadeT = TypeVar("MadeT")


@dataclass(frozen=True, slots=True)
class Item:
    """A source record. place: where it stands, for a person to find it."""

    place: str
    value: Any


@dataclass(frozen=True, slots=True)
class Bad:
    """A source record that gives nothing, and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def each(items: Iterable[Item | Bad], make: Callable[[Any], Iterable[MadeT]]) -> Iterator[MadeT | Bad]:
    """What `make` makes of every record: all of it, or one Bad where it raises RecordError."""
    for item in items:
        if isinstance(item, Bad):
            yield item
            continue
        try:
            made = list(make(item.value))
        except RecordError as error:
            yield Bad(item.place, str(error))
            continue
        yield from made


def text_at(value: Any, key: str, where: str = "") -> str:
    """The text under a key, which must hold more than white space. `where` names the object in the
    RecordError.
    """
    if not isinstance(value, dict):
        raise RecordError(f"{where or 'record'} is no JSON object")
    name = f"{where}.{key}" if where else key
    if value.get(key) is None:
        raise RecordError(f"has no {name}")
    return checked_text(value[key], name)


def checked_text(text: Any, name: str) -> str:
    """`text`, if it is one that can be tokenised and trained on. Raises RecordError with `name` otherwise."""
    if not isinstance(text, str):
        raise RecordError(f"{name} is not text")
    if not text.strip():
        raise RecordError(f"{name} is empty")
    check_surrogates(text, name)
    return text
