"""Parse one line of parallel JSONL into a checked record.

Types are checked strictly, so that a mistake is reported instead of trained on.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any

TextOrIds = str | list[int]

_KEYS = ("main", "branches", "text", "input_ids", "answer_offset", "prompt", "completion")
_BOM = b"\xef\xbb\xbf"


class RecordError(ValueError):
    """The reason why a line is not a record."""


@dataclass(frozen=True, slots=True)
class Branch:
    """One parallel text. With a completion, `body` is the prompt and the completion holds the targets.

    answer_offset: index of the first target token, for a branch without completion. references: other correct
    completions; an evaluation accepts any of them, training uses the completion.
    """

    body: TextOrIds
    completion: str | None = None
    answer_offset: int = 0
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """One line of parallel JSONL.

    standalone: the record is a single branch without main; packing groups such records into samples.
    unknown_keys: keys that have no meaning here, such as an id.
    """

    main: TextOrIds
    branches: tuple[Branch, ...]
    standalone: bool
    unknown_keys: tuple[str, ...] = ()


def parse_line(raw: bytes, vocab_size: int | None = None) -> Record:
    """The record in one line of JSON. Raises RecordError with the reason."""
    return parse_value(_parse_json(raw), vocab_size)


def parse_value(value: Any, vocab_size: int | None = None) -> Record:
    """The record in one JSON value or row of Parquet. Raises RecordError with the reason.

    vocab_size: upper bound of given token ids, if it is known. Unknown keys are kept in `unknown_keys`, but a
    misspelt key is an error.
    """
    if not isinstance(value, dict):
        raise RecordError(f"is a JSON {_json_type(value)}, not an object")
    _check_spelling(value)
    unknown_keys = tuple(key for key in value if key not in _KEYS)
    if "branches" not in value:
        return Record("", (_branch(value, "record", vocab_size),), True, unknown_keys)
    branches = value["branches"]
    if not isinstance(branches, list) or not branches:
        raise RecordError("branches must be a list of at least one branch")
    main = _main(value.get("main", ""), vocab_size)
    parsed = tuple(_branch(item, f"branches[{i}]", vocab_size) for i, item in enumerate(branches))
    return Record(main, parsed, False, unknown_keys)


def check_surrogates(text: str, where: str) -> None:
    """Raise RecordError if the text holds half of a surrogate pair, which no tokenizer accepts."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise RecordError(f"{where} holds half of a surrogate pair, which is not a character")


def _parse_json(raw: bytes) -> Any:
    try:
        return json.loads(
            raw.removeprefix(_BOM).decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
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
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RecordError(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise RecordError(f"is not JSON: {name} is not a JSON number")


def _check_spelling(value: dict[str, Any]) -> None:
    for key in value.keys() - set(_KEYS):
        if near := difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.8):
            raise RecordError(f"has the key {key!r} (did you mean {near[0]}?)")


def _main(value: Any, vocab_size: int | None) -> TextOrIds:
    if isinstance(value, dict):
        return _text_or_ids(value, "main", vocab_size)
    return _text(value, "main")


def _branch(value: Any, where: str, vocab_size: int | None) -> Branch:
    if isinstance(value, str):
        return Branch(_nonempty(_text(value, where), where))
    if not isinstance(value, dict):
        raise RecordError(f"{where} is a JSON {_json_type(value)}, not text or an object")
    _check_spelling(value)
    if "prompt" in value or "completion" in value:
        return _prompt_and_completion(value, where)
    offset = value.get("answer_offset", 0)
    if type(offset) is not int or offset < 0:
        raise RecordError(f"{where}.answer_offset={offset!r} must be a token count of 0 or more")
    return Branch(_nonempty(_text_or_ids(value, where, vocab_size), where), answer_offset=offset)


def _prompt_and_completion(value: dict[str, Any], where: str) -> Branch:
    if conflicting := value.keys() & {"text", "input_ids", "answer_offset"}:
        raise RecordError(f"{where} has prompt or completion beside {min(conflicting)}; give one form")
    if missing := {"prompt", "completion"} - value.keys():
        raise RecordError(f"{where} has no {missing.pop()}")
    completion = _text(value["completion"], f"{where}.completion")
    references = value.get("references", [])
    if not isinstance(references, list):
        raise RecordError(f"{where}.references is a JSON {_json_type(references)}, not a list of texts")
    name = f"{where}.references"
    checked_references = tuple(_nonempty(_text(item, name), name) for item in references)
    prompt = _text(value["prompt"], f"{where}.prompt")
    return Branch(prompt, _nonempty(completion, f"{where}.completion"), references=checked_references)


def _text_or_ids(value: dict[str, Any], where: str, vocab_size: int | None) -> TextOrIds:
    if "text" in value and "input_ids" in value:
        raise RecordError(f"{where} needs either text or input_ids, not both")
    if "text" in value:
        return _text(value["text"], f"{where}.text")
    if "input_ids" in value:
        return _token_ids(value["input_ids"], f"{where}.input_ids", vocab_size)
    raise RecordError(f"{where} needs either text or input_ids")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where} is a JSON {_json_type(value)}, not text")
    check_surrogates(value, where)
    return value


def _token_ids(value: Any, where: str, vocab_size: int | None) -> list[int]:
    if not isinstance(value, list) or set(map(type, value)) - {int} or min(value, default=0) < 0:
        raise RecordError(f"{where} must be a list of token ids")
    limit = 2**31 if vocab_size is None else vocab_size
    if value and max(value) >= limit:
        raise RecordError(f"{where} holds {max(value)}, and the tokenizer has {limit} tokens")
    return value


def _nonempty(value: Any, where: str) -> Any:
    if not value:
        raise RecordError(f"{where} is empty")
    return value


def _json_type(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    return names.get(type(value), "null")
