"""Check that a chat template renders everything that a conversation gives it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import product, takewhile
from typing import Any, TypeVar

from parallelmind.data.convert.conversation import Message, Tools
from parallelmind.data.records import RecordError

Render = Callable[[list[Message], Tools], str]
ResultT = TypeVar("ResultT")

_MAX_EXCERPT = 60  # characters


class TemplateRefusedError(RecordError):
    """The chat template raises an error for a conversation."""


def in_template_form(messages: list[Message], convert: Callable[[list[Message]], ResultT]) -> ResultT:
    """The result for the first form of the messages that `convert` accepts.

    Chat templates expect the arguments of a call as an object or as JSON text, and content beside it that is
    empty as "" or as None. If no form is accepted, raises the RecordError of the first one that the template
    renders, or else of the first one.
    """
    if not any(message.get("tool_calls") for message in messages):
        return convert(messages)
    errors = []
    for write_arguments, empty in product((None, _json_text), ("", None)):
        try:
            return convert([_in_form(message, write_arguments, empty) for message in messages])
        except RecordError as error:
            errors.append(error)
    raise min(errors, key=lambda error: isinstance(error, TemplateRefusedError))


def _in_form(message: Message, write_arguments: Callable[[Any], str] | None, empty: str | None) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = message["tool_calls"]
    if write_arguments:
        calls = [
            _with_function(call, arguments=write_arguments(_function(call)["arguments"])) for call in calls
        ]
    return {**message, "content": message["content"] or empty, "tool_calls": calls}


def check_rendered(messages: list[Message], tools: Tools, targets: Collection[int], render: Render) -> None:
    """Raise RecordError if the rendered text lacks something that is learnt or that answers depend on.

    targets: indices of the turns that are learnt. Their text and reasoning must stand in their part of the
    rendered text; tools, calls and the text of all turns but other assistant turns must stand in the text.
    White space and the marks around reasoning do not count.
    """
    text = render(messages, tools)
    if tools and render(messages, None) == text:
        raise RecordError("has tools, which the chat template leaves out")
    for index, message in enumerate(messages):
        is_target = index in targets
        rendered = _squeeze(_part(messages, tools, index, text, render) if is_target else text)
        for piece in _pieces(message, is_target):
            if not _contains(rendered, piece):
                raise RecordError(f"has {_excerpt(piece)}, which the chat template leaves out")
        _check_calls(messages, tools, index, text, render)


def _part(messages: list[Message], tools: Tools, index: int, text: str, render: Render) -> str:
    """The text from the end of the turn before `index` to the end of the turn after it."""
    start = common_length(text, render(messages[:index], tools))
    if index + 2 >= len(messages):
        return text[start:]
    return text[start : common_length(text, render(messages[: index + 2], tools))]


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Number of characters, or of items, at the start that two texts or lists share."""
    if first[: len(second)] == second:
        return len(second)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _pieces(message: Message, is_target: bool) -> Iterator[str]:
    """The texts of a turn that must be rendered. Templates may leave out earlier answers by their design."""
    if message["role"] != "assistant" or is_target:
        yield from re.split(r"</?think>", message["content"] or "")
    if is_target:
        yield message.get("reasoning_content", "")


def _contains(squeezed: str, piece: str) -> bool:
    """Whether a text without white space contains a piece, as it is or as JSON."""
    return _squeeze(piece) in squeezed or _squeeze(_json_text(piece)[1:-1]) in squeezed


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _check_calls(messages: list[Message], tools: Tools, index: int, text: str, render: Render) -> None:
    """A call is rendered if another name in it changes the text, and as JSON unless it stands in Python."""
    for number, call in enumerate(messages[index].get("tool_calls", ())):
        name, arguments = _function(call)["name"], _function(call)["arguments"]
        calls = [*messages[index]["tool_calls"]]
        calls[number] = _with_function(call, name=f"{name}_")
        renamed = [*messages]
        renamed[index] = {**messages[index], "tool_calls": calls}
        if render(renamed, tools) == text:
            raise RecordError(f"has a call of {name}, which the chat template leaves out")
        if str(arguments) in text and str(arguments) not in (_json_text(arguments), arguments):
            raise RecordError(
                f"has a call of {name}, whose arguments the chat template does not write as JSON"
            )


def _function(call: dict[str, Any]) -> dict[str, Any]:
    function: dict[str, Any] = call["function"]
    return function


def _with_function(call: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**call, "function": {**_function(call), **changes}}


def _json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _excerpt(piece: str) -> str:
    text = piece.strip()
    return repr(text if len(text) <= _MAX_EXCERPT else f"{text[:_MAX_EXCERPT]}…")
