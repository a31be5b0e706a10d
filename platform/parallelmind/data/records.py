"""One line of parallel JSONL to a checked record. Strict about types, so that a mistake is reported and not
trained on.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any

Piece = str | list[int]  # text, or token ids in place of it

_KEYS = ("main", "branches", "text", "input_ids", "answer_offset", "prompt", "completion")
_BOM = b"\xef\xbb\xbf"


class RecordError(ValueError):
    """Why a line is no record."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One parallel text. With a completion, `body` is the prompt and targets begin where the completion does.

    references: other completions that are right as well; an evaluation takes any of them, training reads the
    completion.
    """

    body: Piece
    completion: str | None = None
    answer_offset: int = 0
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """`lone` records hold one branch and no main; the pipeline groups them into samples. extra: keys that
    mean nothing here.
    """

    main: Piece
    branches: tuple[Branch, ...]
    lone: bool
    extra: tuple[str, ...] = ()


def parse_line(raw: bytes, vocab_size: int | None = None) -> Record:
    """The record in one line of JSON. Raises RecordError with the reason."""
    return parse_value(_parse_json(raw), vocab_size)


def parse_value(value: Any, vocab_size: int | None = None) -> Record:
    """The record in one JSON value or row of Parquet.

    vocab_size: token ids given in place of text must be below it, where it is known. Keys that mean nothing
    here (an id, a source) are kept apart, but a misspelt one is an error. Raises RecordError with the reason.
    """
    if not isinstance(value, dict):
        raise RecordError(f"is a JSON {_kind(value)}, not an object")
    _refuse_misspelt(value)
    extra = tuple(key for key in value if key not in _KEYS)
    if "branches" not in value:
        return Record("", (_branch(value, "record", vocab_size),), True, extra)
    branches = value["branches"]
    if not isinstance(branches, list) or not branches:
        raise RecordError("branches must be a list of at least one branch")
    main = _main(value.get("main", ""), vocab_size)
    return Record(
        main,
        tuple(_branch(item, f"branches[{i}]", vocab_size) for i, item in enumerate(branches)),
        False,
        extra,
    )


def _parse_json(raw: bytes) -> Any:
    try:
        return json.loads(
            raw.removeprefix(_BOM).decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError as error:
        raise RecordError(f"byte {error.start} is not UTF-8") from error
    except RecursionError as error:
        raise RecordError("is nested too deeply") from error
    except RecordError:
        raise
    except ValueError as error:
        raise RecordError(f"is not JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RecordError(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return found


def _no_constant(name: str) -> Any:
    raise RecordError(f"is not JSON: {name} is no JSON number")


def _refuse_misspelt(value: dict[str, Any]) -> None:
    for key in value.keys() - set(_KEYS):
        if near := difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.8):
            raise RecordError(f"has the key {key!r} (did you mean {near[0]}?)")


def _main(value: Any, vocab_size: int | None) -> Piece:
    if isinstance(value, dict):
        return _body(value, "main", vocab_size)
    return _text(value, "main")


def _branch(value: Any, where: str, vocab_size: int | None) -> Branch:
    if isinstance(value, str):
        return Branch(_filled(_text(value, where), where))
    if not isinstance(value, dict):
        raise RecordError(f"{where} is a JSON {_kind(value)}, not text or an object")
    _refuse_misspelt(value)
    if "prompt" in value or "completion" in value:
        return _prompted(value, where)
    offset = value.get("answer_offset", 0)
    if type(offset) is not int or offset < 0:
        raise RecordError(f"{where}.answer_offset={offset!r} must be a token count of 0 or more")
    return Branch(_filled(_body(value, where, vocab_size), where), answer_offset=offset)


def _prompted(value: dict[str, Any], where: str) -> Branch:
    if extra := value.keys() & {"text", "input_ids", "answer_offset"}:
        raise RecordError(f"{where} has prompt or completion beside {min(extra)}; give one form")
    if missing := {"prompt", "completion"} - value.keys():
        raise RecordError(f"{where} has no {missing.pop()}")
    completion = _text(value["completion"], f"{where}.completion")
    references = value.get("references", [])
    if not isinstance(references, list):
        raise RecordError(f"{where}.references is a JSON {_kind(references)}, not a list of texts")
    others = tuple(_filled(_text(item, f"{where}.references"), f"{where}.references") for item in references)
    prompt = _text(value["prompt"], f"{where}.prompt")
    return Branch(prompt, _filled(completion, f"{where}.completion"), references=others)


def _body(value: dict[str, Any], where: str, vocab_size: int | None) -> Piece:
    if ("text" in value) == ("input_ids" in value):
        raise RecordError(
            f"{where} needs either text or input_ids" + (", not both" if "text" in value else "")
        )
    if "text" in value:
        return _text(value["text"], f"{where}.text")
    return _ids(value["input_ids"], f"{where}.input_ids", vocab_size)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where} is a JSON {_kind(value)}, not text")
    refuse_surrogates(value, where)
    return value


def refuse_surrogates(text: str, where: str) -> None:
    """Raises RecordError for text that holds half of a surrogate pair, which no tokenizer takes."""
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RecordError(f"{where} holds half of a surrogate pair, which is no character")


def _ids(value: Any, where: str, vocab_size: int | None) -> list[int]:
    if not isinstance(value, list) or set(map(type, value)) - {int} or min(value, default=0) < 0:
        raise RecordError(f"{where} must be a list of token ids")
    limit = 2**31 if vocab_size is None else vocab_size
    if value and max(value) >= limit:
        raise RecordError(f"{where} holds {max(value)}, and the tokenizer has {limit} tokens")
    return value


def _filled(piece: Any, where: str) -> Any:
    if not piece:
        raise RecordError(f"{where} is empty")
    return piece


def _kind(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")
