"""Calls of tools in the text of an answer, whole or as the answer is streamed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import parallelmind as pm
from serving.protocol.openai_response import ChatFormatter, Json
from serving.protocol.strict_json import parse_json
from serving.protocol.tools import check_object

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Piece(NamedTuple):
    """What a part of an answer adds. calls: (name, arguments as JSON) of complete calls."""

    content: str
    calls: list[tuple[str, str]]


class ToolCallParser:
    """Finds calls in a growing text.

    A call is a JSON object with a name and arguments, or a list of them, between two tags; or it is the whole
    answer, without tags. What only looks like a call is content.
    """

    def __init__(self, names: Sequence[str], only_one: bool = False) -> None:
        """names: of the tools. only_one: later calls are left out."""
        self._names, self._only_one = names, only_one
        self._withheld, self._num_calls, self._is_bare = "", 0, False
        self._has_begun = False

    def push(self, text: str) -> Piece:
        """What can be told now; the rest is withheld until more text is known."""
        self._withheld += text
        self._find_bare()
        if self._is_bare:
            return Piece("", [])
        content, calls = "", list[tuple[str, str]]()
        while (start := self._withheld.find(OPEN)) >= 0 and (end := self._withheld.find(CLOSE, start)) >= 0:
            found = self._parse(self._withheld[start + len(OPEN) : end])
            end += len(CLOSE)
            content += self._withheld[:start].rstrip() if found else self._withheld[:end]
            calls += found
            self._withheld = self._withheld[end:]
        cut = start if start >= 0 else len(self._withheld) - _overlap(self._withheld, OPEN)
        told = self._withheld[:cut].rstrip()  # white space before a call is not part of the content
        self._withheld = self._withheld[len(told) :]
        return Piece(content + told, self._count(calls))

    def flush(self) -> Piece:
        """The withheld text: the answer is complete."""
        rest, self._withheld = self._withheld, ""
        body = rest.strip().removeprefix(OPEN)  # a model may end before it closes the tag
        calls = self._parse(body) if self._is_bare or OPEN in rest else []
        is_content = not calls and (rest.strip() or not self._num_calls)
        return Piece(rest if is_content else "", self._count(calls))

    def _find_bare(self) -> None:
        """Decide, with the first characters, whether the answer is JSON as a whole."""
        first = self._withheld.lstrip()[:1]
        if first and not self._has_begun:
            self._has_begun, self._is_bare = True, first in "{["

    def _count(self, calls: list[tuple[str, str]]) -> list[tuple[str, str]]:
        room = max(1 - self._num_calls, 0) if self._only_one else len(calls)
        self._num_calls += len(calls)
        return calls[:room]

    def _parse(self, text: str) -> list[tuple[str, str]]:
        """The calls in a JSON text; empty if it holds anything else."""
        try:
            value = parse_json(text)
        except ValueError:
            return []
        calls = [self._call(item) for item in (value if isinstance(value, list) else [value])]
        return [call for call in calls if call is not None] if None not in calls else []

    def _call(self, value: Any) -> tuple[str, str] | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if arguments is None:
            arguments = {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        try:
            return value["name"], check_object(text)
        except ValueError:
            return None


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of the text that is a beginning of the tag."""
    return next((size for size in range(len(tag) - 1, 0, -1) if text.endswith(tag[:size])), 0)


class ToolChatFormatter(ChatFormatter):
    """Format of /v1/chat/completions for a request with tools."""

    def __init__(self, id: str, model: str, texts: Any, names: Sequence[str], only_one: bool) -> None:
        super().__init__(id, model, texts)
        self._names, self._only_one, self._call_prefix = names, only_one, f"call_{id.partition('-')[2]}"
        self._parsers: dict[int, ToolCallParser] = {}
        self._num_calls: dict[int, int] = {}

    def choice(self, index: int, events: Sequence[pm.Event]) -> Json:
        choice = super().choice(index, events)
        parser = ToolCallParser(self._names, self._only_one)
        pieces = [parser.push(choice["message"]["content"]), parser.flush()]
        calls = [call for piece in pieces for call in piece.calls]
        if calls:
            content = "".join(piece.content for piece in pieces)
            tool_calls = [self._call(index, number, *call) for number, call in enumerate(calls)]
            choice["message"] |= {"content": content or None, "tool_calls": tool_calls}
            choice["finish_reason"] = _finish_reason(choice["finish_reason"])
        return choice

    def delta(self, event: pm.Event, text_offset: int | None) -> Json:
        choice = super().delta(event, text_offset)
        parser = self._parsers.setdefault(event.branch, ToolCallParser(self._names, self._only_one))
        pieces = [parser.push(event.text), *([parser.flush()] if event.finish_reason else [])]
        choice["delta"]["content"] = "".join(piece.content for piece in pieces)
        calls = [call for piece in pieces for call in piece.calls]
        first = self._num_calls.get(event.branch, 0)
        self._num_calls[event.branch] = first + len(calls)
        if calls:
            choice["delta"]["tool_calls"] = [
                {"index": number, **self._call(event.branch, number, *call)}
                for number, call in enumerate(calls, first)
            ]
        if self._num_calls[event.branch]:
            choice["finish_reason"] = _finish_reason(choice["finish_reason"])
        return choice

    def _call(self, index: int, number: int, name: str, arguments: str) -> Json:
        """A call of a choice. Its id is the same in a stream that is sent again."""
        function = {"name": name, "arguments": arguments}
        return {"id": f"{self._call_prefix}_{index}_{number}", "type": "function", "function": function}


def _finish_reason(reason: str | None) -> str | None:
    return "tool_calls" if reason == "stop" else reason
