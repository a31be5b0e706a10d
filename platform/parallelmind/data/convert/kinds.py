"""Kinds of source records: the keys that indicate each kind, and the keys that its conversion reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from parallelmind.data.convert.answers import ANSWER_TEXT_KEYS
from parallelmind.data.convert.conversation import (
    CONVERSATION_KEYS,
    TURN_KEYS,
    check_not_python,
    parse_turns_text,
)

Source = Literal[
    "messages",
    "sharegpt",
    "preference",
    "completions",
    "reasoning",
    "squad",
    "hotpotqa",
    "alpaca",
    "pairs",
    "text",
]
Shape = Literal["flat", "documents", "paths"]
SHAPES: Mapping[Shape, tuple[Source, ...]] = {  # the sources that have what a shape makes branches of
    "flat": get_args(Source),
    "documents": ("squad", "hotpotqa"),
    "paths": ("messages", "sharegpt", "reasoning", "alpaca", "pairs"),
}
Keys = Mapping[str, Any]  # for every key that is read, the keys of the objects under it, or None

_PARALLEL_KEYS = {"main", "branches", "answer_offset", "input_ids", "rendered"}  # keys of parallel JSONL only


def _keys(*names: str, **nested: Keys) -> Keys:
    return {**dict.fromkeys(names), **nested}


_TURN = _keys(*TURN_KEYS)
_ANSWER = _keys(*TURN_KEYS, *ANSWER_TEXT_KEYS)
_CONVERSATION = _keys(*CONVERSATION_KEYS)
_EXCHANGE = _keys(*CONVERSATION_KEYS, "history")
_ALPACA = _keys(*_EXCHANGE, "instruction", "input", "context")
_QUESTION = _keys("question", "answers", "answer")
_PARAGRAPH = _keys("context", qas=_QUESTION)


@dataclass(frozen=True, slots=True)
class Kind:
    """A form of a kind of source record. required: keys that indicate it. keys: all keys that are read."""

    source: Source
    required: tuple[str, ...]
    keys: Keys

    def check_turns(self, value: dict[str, Any]) -> None:
        """Raise RecordError for turns in a text that is not JSON."""
        for key, item in value.items():
            if self.keys.get(key) is _TURN:
                check_not_python(item, key)

    def with_turns(self, value: dict[str, Any]) -> dict[str, Any]:
        """A record of this kind with turns in place of their JSON text."""
        return {
            key: parse_turns_text(item) if self.keys.get(key) is _TURN else item
            for key, item in value.items()
        }


def _preference(*prompt: str, **keys: Keys) -> Kind:
    required = (*prompt, "chosen", "rejected")
    return Kind("preference", required, {**_keys(*required), **_EXCHANGE, **keys})


def _pair(prompt: str, completion: str) -> Kind:
    return Kind("pairs", (prompt, completion), {**_EXCHANGE, prompt: _TURN, completion: _TURN})


def _completions(*required: str, **keys: Keys) -> Kind:
    return Kind("completions", required, {**_EXCHANGE, **_keys(*required), required[-1]: _ANSWER, **keys})


def _reasoning(*required: str) -> Kind:
    return Kind("reasoning", required, _keys(*_EXCHANGE, *required))


# The first kind that a record's keys indicate is its kind.
_KINDS = (
    _preference("prompt", prompt=_TURN, chosen=_TURN, rejected=_TURN),
    _preference("conversations", conversations=_TURN, chosen=_TURN, rejected=_TURN),
    _preference("instruction", **_ALPACA),
    _preference("question"),
    _preference(chosen=_TURN, rejected=_TURN),
    *(
        kind
        for key in ("completions", "responses")
        for kind in (
            _completions("prompt", key, prompt=_TURN),
            _completions("messages", key, messages=_TURN),
            _completions("conversations", key, conversations=_TURN),
            _completions("instruction", key, **_ALPACA),
            _completions("question", key),
        )
    ),
    _completions("prompt", "answers", prompt=_TURN),  # beside other prompts, they often are references
    _reasoning("question", "deepseek_thinking_trajectory_parallel", "deepseek_attempt"),
    _reasoning("question", "response_reasoning", "response_content"),
    Kind("messages", ("messages",), {**_CONVERSATION, "messages": _TURN}),
    Kind("sharegpt", ("conversations",), {**_CONVERSATION, "conversations": _TURN}),
    *(
        Kind(source, required, keys)
        for source in ("squad", "hotpotqa")
        for required, keys in (
            (("paragraphs",), _keys(paragraphs=_PARAGRAPH)),
            (("qas",), _PARAGRAPH),
            (("context", "question"), _keys("context", *_QUESTION)),
            (("documents", "question"), _keys("documents", *_QUESTION)),
        )
    ),
    Kind("alpaca", ("instruction", "output"), {**_ALPACA, "output": None}),
    Kind("alpaca", ("instruction", "response"), {**_ALPACA, "response": None}),
    _pair("prompt", "response"),
    _pair("prompt", "completion"),
    _pair("prompt", "output"),
    _pair("question", "answer"),
    _pair("question", "response"),
    _pair("query", "response"),
    _pair("input", "output"),
)

KNOWN_KEYS = frozenset(key for kind in _KINDS for key in kind.keys)  # of records, not of turns


def find_kind(value: Any, source: Source | Literal["auto"], text_column: str) -> Kind | None:
    """The kind that the keys with a value in a record indicate, among those of `source`, or None.

    Parallel JSONL is of no kind that is detected.
    """
    if not isinstance(value, dict):
        return None
    if source == "auto" and is_parallel(value):
        return None
    given = _given_keys(value)
    return next((kind for kind in _kinds(source, text_column) if given >= set(kind.required)), None)


def is_parallel(value: Any) -> bool:
    """Whether a value is a record with keys that only parallel JSONL has."""
    given = _given_keys(value) if isinstance(value, dict) else set[str]()
    return bool(given & _PARALLEL_KEYS) or given >= {"documents", "reduce"}


def _given_keys(value: dict[str, Any]) -> set[str]:
    return {key for key, item in value.items() if item is not None}


def is_desirable(value: Mapping[str, Any]) -> bool | None:
    """Whether the answer of a pair is one to learn, by the `label` of KTO data, true or false; else None."""
    label = value.get("label")
    text = str(label).lower() if isinstance(label, bool | str) else ""
    return {"true": True, "false": False}.get(text)


def required_keys(source: Source, text_column: str) -> list[str]:
    """The combinations of keys of which a record of this source must have one, as text."""
    return [" + ".join(kind.required) for kind in _kinds(source, text_column)]


def _kinds(source: Source | Literal["auto"], text_column: str) -> Iterator[Kind]:
    kinds = (*_KINDS, Kind("text", (text_column,), _keys(text_column)))
    return (kind for kind in kinds if source in ("auto", kind.source))


def unused_keys(kind: Kind, value: dict[str, Any]) -> set[str]:
    """Names of the keys of a record that hold a value and are not read."""
    names = set(_unused_keys(kind.with_turns(value), kind.keys))
    return names - {"label"} if kind.source == "pairs" and is_desirable(value) is not None else names


def _unused_keys(value: dict[str, Any], keys: Keys, prefix: str = "") -> Iterator[str]:
    """Names of the keys that hold a value and are not read, those of objects in lists as `messages[].id`."""
    for key, item in value.items():
        if key not in keys:
            yield from [f"{prefix}{key}"] if item is not None else []
        elif keys[key] is not None:
            for element in item if isinstance(item, list) else [item]:
                if isinstance(element, dict):
                    yield from _unused_keys(element, keys[key], f"{prefix}{key}[].")
