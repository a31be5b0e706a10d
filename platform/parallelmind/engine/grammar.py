"""Grammars that constrain what a branch decodes, and the limits of their size. No torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, Self, get_args

from parallelmind.errors import UserError, first_line, short_repr

MAX_GRAMMAR_CHARS = 1 << 16
MAX_SCHEMA_DEPTH = 64
MAX_REPEAT = 10_000
MAX_CHOICES = 1000
_MAX_MULTIPLE = 10_000  # an automaton of this many states counts the remainder

Kind = Literal["json", "regex", "choice", "lark"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a branch may decode. The branch finishes where the text is complete.

    kind, text: a JSON schema as JSON; a regular expression; texts of which one is decoded, as a JSON list;
        or a grammar in the Lark notation of llguidance.
    field: the name of the setting in errors.
    """

    kind: Kind
    text: str
    field: str = field(default="grammar", compare=False)

    def __post_init__(self) -> None:
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise self.error(f"holds {len(self.text)} characters, {MAX_GRAMMAR_CHARS} allowed; shorten it")

    @classmethod
    def of(cls, value: Any, field: str = "grammar") -> Self:
        """From `{"json": schema}`, `{"regex": text}`, `{"choice": texts}` or `{"lark": text}`.

        Raises UserError for anything else, and for what exceeds the limits above.
        """
        if not isinstance(value, Mapping) or len(value) != 1 or next(iter(value)) not in KINDS:
            raise UserError(f"{field}={short_repr(value)}: give one of {', '.join(KINDS)} with its value")
        kind, content = next(iter(value.items()))
        text = {"json": _schema_text, "choice": _choice_text}.get(kind, _plain_text)(content, field)
        return cls(kind, text, field)

    def error(self, reason: str) -> UserError:
        return UserError(f"{self.field}: {reason}")


def _plain_text(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{field}={short_repr(value)}: give a text that is not empty")
    _check_repeats(value, field)
    return value


def _choice_text(value: Any, field: str) -> str:
    if not isinstance(value, (list, tuple)) or not all(isinstance(text, str) and text for text in value):
        raise UserError(f"{field}={short_repr(value)}: give a list of texts, none of them empty")
    if not 0 < len(value) <= MAX_CHOICES:
        raise UserError(f"{field}: {len(value)} choices; give 1 to {MAX_CHOICES}")
    return json.dumps(list(value))


def _schema_text(value: Any, field: str) -> str:
    """A JSON schema, also one as text, as JSON. Raises UserError for one that exceeds the limits."""
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        if not isinstance(schema, (Mapping, bool)):
            raise UserError(f"{field}={short_repr(value)}: give a JSON schema: an object")
        _check_schema(schema, field)
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{field}={short_repr(value)}: is not JSON ({first_line(error)})") from error


def _check_schema(schema: Any, field: str) -> None:
    """Raise UserError for a schema that is nested too deeply, or that counts too far."""
    multiple = 1
    for key, value, depth in _walk(schema):
        if depth > MAX_SCHEMA_DEPTH:
            raise UserError(f"{field}: is nested more than {MAX_SCHEMA_DEPTH} deep; flatten it")
        if key in _COUNTS and isinstance(value, (int, float)) and value > MAX_REPEAT:
            raise UserError(f"{field}: {key}={short_repr(value)}, {MAX_REPEAT} allowed; give less")
        if key == "pattern" and isinstance(value, str):
            _check_repeats(value, field)
        if key == "multipleOf" and isinstance(value, (int, float)) and math.isfinite(value):
            multiple *= max(Fraction(str(value)).numerator, 1)
            if multiple > _MAX_MULTIPLE:
                raise UserError(
                    f"{field}: multipleOf={short_repr(value)}: all values of multipleOf multiply to "
                    f"{multiple}, {_MAX_MULTIPLE} allowed; leave it out"
                )


def _walk(schema: Any) -> Iterator[tuple[str, Any, int]]:
    """Every key and value of a schema, with its depth. No recursion: the depth is not known yet."""
    waiting: list[tuple[Any, int]] = [(schema, 0)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, Mapping):
            items = [(str(key), value) for key, value in node.items()]
        else:
            items = [("", value) for value in node] if isinstance(node, (list, tuple)) else []
        for key, value in items:
            yield key, value, depth
            waiting.append((value, depth + 1))


def _check_repeats(pattern: str, field: str) -> None:
    for match in _REPEAT.finditer(pattern):
        counts = [int(digits[:9]) for digits in match.groups() if digits]
        if max(counts, default=0) > MAX_REPEAT:
            raise UserError(f"{field}: {match[0][:40]} repeats more than {MAX_REPEAT} times; give less")
