"""Parse one line of parallel JSONL into a checked record.

Types are checked strictly, so that a mistake is reported instead of trained on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from parallelmind.data.record_keys import MAIN_FORMS, RECORD_FORMS, SEGMENT_FORMS, Form, check_keys
from parallelmind.data.records import (
    MAX_DEPTH,
    Record,
    RecordError,
    Segment,
    Spans,
    TextOrIds,
    check_surrogates,
)
from parallelmind.errors import short_repr

_BOM = b"\xef\xbb\xbf"


def parse_line(raw: bytes, vocab_size: int | None = None) -> Record:
    """The record in one line of JSON. Raises RecordError with the reason."""
    return parse_value(_parse_json(raw), vocab_size)


def parse_value(value: Any, vocab_size: int | None = None) -> Record:
    """The record in one JSON value or row of Parquet. Raises RecordError with the reason.

    vocab_size: upper bound of given token ids, if it is known. A key without a meaning is kept in
    `unknown_keys`. A misspelt key is an error, and so is one whose content would be left out.
    """
    if not isinstance(value, dict):
        raise RecordError(f"is a {_type_name(value)}, not an object")
    return _Parser(vocab_size).parse_record(value)


def _parse_json(raw: bytes) -> Any:
    try:
        return json.loads(
            raw.removeprefix(_BOM).decode("utf-8"),
            object_pairs_hook=unique_keys,
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


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values. Raises RecordError if a key stands in it twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RecordError(f"has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise RecordError(f"is not JSON: {name} is not a JSON number")


def _without_null_fields(value: dict[str, Any]) -> dict[str, Any]:
    """A null field is absent, as in Parquet: exporters of tables write one for every column of a row."""
    return {key: item for key, item in value.items() if not _is_null(item)}


def _is_null(item: Any) -> bool:
    """Whether a value is null, or an object of nulls, which some writers of tables make of a null object."""
    if isinstance(item, dict):
        return bool(item) and all(map(_is_null, item.values()))
    return item is None


class _Parser:
    """Parses one record. Messages name a segment by its place, such as `branches[1].branches[0].reduce`."""

    def __init__(self, vocab_size: int | None) -> None:
        self.vocab_size = vocab_size
        self.unknown_keys: dict[str, None] = {}  # an ordered set
        self.empty_prompts: list[str] = []  # the places of segments without a token before the completion
        self.has_target = False

    def parse_record(self, value: dict[str, Any]) -> Record:
        value = self._check_object(value, "record", RECORD_FORMS)
        main = self._main(value.get("main", ""))
        if "documents" in value:
            record = self._parse_documents(value, main)
        elif "branches" in value:
            branches, reduce = self._branches_and_reduce(value, "", 1)
            record = Record(main, branches, False, tuple(self.unknown_keys), reduce)
        else:
            record = Record(main, (self._segment(value, "record"),), not main, tuple(self.unknown_keys))
        if self.empty_prompts and not record.is_flat:
            raise RecordError(
                f"{self.empty_prompts[0]}.prompt is empty; with nested branches or a reduce, "
                "every completion needs a prompt of at least one token"
            )
        if not self.has_target:
            raise RecordError("has targets=[] in every segment; give at least one of them a target")
        return record

    def _parse_documents(self, value: dict[str, Any], main: TextOrIds) -> Record:
        """A record with documents, which a reduce reads."""
        texts = value["documents"]
        if not isinstance(texts, list) or not texts:
            raise RecordError("documents must be a list of at least one text")
        if "reduce" not in value:
            raise RecordError("has documents without a reduce, which reads them; give the question as reduce")
        documents = tuple(self._document(text, f"documents[{index}]") for index, text in enumerate(texts))
        branches, reduce = self._branches_and_reduce({"branches": [], **value}, "", 1, at_least=0)
        unknown = tuple(self.unknown_keys)
        return Record(main, (*documents, *branches), False, unknown, reduce, len(documents))

    def _document(self, value: Any, where: str) -> Segment:
        if isinstance(value, dict):
            value = self._check_object(value, where, MAIN_FORMS)
            return Segment(_nonempty(_text_or_ids(value, where, self.vocab_size), where), targets=())
        return Segment(_nonempty(_text(value, where), where), targets=())

    def _check_object(self, value: dict[str, Any], where: str, forms: Sequence[Form]) -> dict[str, Any]:
        """The object without null fields. Notes its unknown keys."""
        value = _without_null_fields(value)
        if "reduce" in value and not {"branches", "documents"} & value.keys():
            raise RecordError(f"{where} has reduce without branches; give the branches that it reads")
        if unknown := check_keys(value, where, forms):
            prefix = "" if where == "record" else re.sub(r"\[\d+\]", "[]", where) + "."
            self.unknown_keys.update(dict.fromkeys(f"{prefix}{key}" for key in unknown))
        return value

    def _main(self, value: Any) -> TextOrIds:
        if not isinstance(value, dict):
            return _text(value, "main")
        return _text_or_ids(self._check_object(value, "main", MAIN_FORMS), "main", self.vocab_size)

    def _branches_and_reduce(
        self, value: dict[str, Any], prefix: str, depth: int, at_least: int = 1
    ) -> tuple[tuple[Segment, ...], Segment | None]:
        """What continues a record or segment. prefix: before its keys in messages. depth: of its branches."""
        if depth > MAX_DEPTH:
            raise RecordError(f"has branches that are nested more than {MAX_DEPTH} deep; nest fewer of them")
        items = value["branches"]
        if not isinstance(items, list) or len(items) < at_least:
            raise RecordError(f"{prefix}branches must be a list of at least one branch")
        branches = tuple(
            self._text_or_segment(item, f"{prefix}branches[{index}]", depth)
            for index, item in enumerate(items)
        )
        if "reduce" not in value:
            return branches, None
        return branches, self._text_or_segment(value["reduce"], f"{prefix}reduce", depth)

    def _text_or_segment(self, value: Any, where: str, depth: int) -> Segment:
        if isinstance(value, str):
            self.has_target = True
            return Segment(_nonempty(_text(value, where), where))
        if not isinstance(value, dict):
            raise RecordError(f"{where} is a {_type_name(value)}, not text or an object")
        value = self._check_object(value, where, SEGMENT_FORMS)
        segment = self._segment(value, where)
        if "branches" not in value:
            return segment
        branches, reduce = self._branches_and_reduce(value, f"{where}.", depth + 1)
        return replace(segment, branches=branches, reduce=reduce)

    def _segment(self, value: dict[str, Any], where: str) -> Segment:
        """The segment in an object whose keys are checked, without what follows it."""
        if "prompt" in value or "completion" in value:
            segment = _prompt_and_completion(value, where)
            self.has_target = True
            if not segment.body:
                self.empty_prompts.append(where)
            return segment
        body = _nonempty(_text_or_ids(value, where, self.vocab_size), where)
        rendered = value.get("rendered", False)
        if type(rendered) is not bool:
            raise RecordError(f"{where}.rendered={short_repr(rendered)} must be true or false")
        targets = _targets(value, where, body)
        self.has_target |= targets != ()
        return Segment(body, targets=targets, rendered=rendered)


def _targets(value: dict[str, Any], where: str, body: TextOrIds) -> Spans:
    """The tokens of `body` that are targets. How many tokens a text has is known when it is tokenised."""
    if "targets" not in value:
        offset = value.get("answer_offset", 0)
        if type(offset) is not int or offset < 0:
            raise RecordError(
                f"{where}.answer_offset={short_repr(offset)} must be a token count of 0 or more"
            )
        return ((offset, None),)
    if "answer_offset" in value:
        raise RecordError(f"{where} has both answer_offset and targets; give one of them")
    spans = value["targets"]
    if not isinstance(spans, list) or not all(map(_is_span, spans)):
        raise RecordError(f"{where}.targets must be a list of [start, end] in tokens, with start before end")
    for (_, end), (start, _) in pairwise(spans):
        if start < end:
            raise RecordError(f"{where}.targets must be sorted and disjoint; {start} comes before {end}")
    if isinstance(body, list) and spans and spans[-1][1] > len(body):
        raise RecordError(f"{where}.targets ends at {spans[-1][1]}, and {where} has {len(body)} tokens")
    return tuple((start, end) for start, end in spans)


def _is_span(value: Any) -> bool:
    """Whether a JSON value is [start, end] with 0 <= start < end."""
    return isinstance(value, list) and list(map(type, value)) == [int, int] and 0 <= value[0] < value[1]


def _prompt_and_completion(value: dict[str, Any], where: str) -> Segment:
    if "prompt" not in value:
        raise RecordError(f'{where} has no prompt; give one, or the completion as "text"')
    if "completion" not in value:
        raise RecordError(f'{where} has no completion; give one, or a prompt to continue as "text"')
    completion = _text(value["completion"], f"{where}.completion")
    references = value.get("references", [])
    if not isinstance(references, list):
        raise RecordError(f"{where}.references is a {_type_name(references)}, not a list of texts")
    name = f"{where}.references"
    checked_references = tuple(_nonempty(_text(item, name), name) for item in references)
    prompt = _text(value["prompt"], f"{where}.prompt")
    return Segment(prompt, _nonempty(completion, f"{where}.completion"), references=checked_references)


def _text_or_ids(value: dict[str, Any], where: str, vocab_size: int | None) -> TextOrIds:
    if "text" in value:
        return _text(value["text"], f"{where}.text")
    if "input_ids" in value:
        return _token_ids(value["input_ids"], f"{where}.input_ids", vocab_size)
    if where != "record" and "main" in value:
        raise RecordError(f"{where} has main, which only a record has; give its tokens as text or input_ids")
    raise RecordError(f"{where} needs either text or input_ids")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RecordError(f"{where} is a {_type_name(value)}, not text")
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


def _type_name(value: Any) -> str:
    """Parquet and Python also have types that JSON lacks, such as bytes."""
    names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
    name = "null" if value is None else names.get(type(value))
    return f"JSON {name}" if name else type(value).__name__
