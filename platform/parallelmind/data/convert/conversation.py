"""Conversations of source records as messages and tools, in the form that chat templates expect."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from parallelmind.data.convert.source_records import check_text, is_blank
from parallelmind.data.records import RecordError, check_surrogates

Message = dict[str, Any]
Tools = list[dict[str, Any] | Callable[..., Any]] | None  # as transformers types it; here always objects

_TARGET_KEYS = ("weight", "train")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_CALL_KEYS = ("tool_calls", "function_call")
_ARGUMENT_KEYS = ("arguments", "parameters", "input")
_TOOL_KEYS = ("tools", "functions")
SYSTEM_KEYS = ("system", "system_prompt")
CONVERSATION_KEYS = frozenset({*SYSTEM_KEYS, *_TOOL_KEYS})  # keys of a record beside its turns
TURN_KEYS = frozenset(
    {"role", "from", "content", "value", "name", "tool_call_id", *_CALL_KEYS, *_REASONING_KEYS, *_TARGET_KEYS}
)

_CALL_ROLES = ("function_call", "tool_call")  # the text of such a turn is a call, or a list of calls
_PYTHON = re.compile(r"\s*\[?\s*\{'(role|from|content|value|text|answer_start)': ")
_ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "ai", "bot", *_CALL_ROLES), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
}


def parse_messages(value: Any, key: str) -> list[Message]:
    """The turns under `key` as messages; in the source they may be {"from", "value"}.

    A message is {"role", "content", "train"} with name, tool_call_id, tool_calls and reasoning where they are
    given. train: whether the turn is a target. Arguments of calls are objects. A system text next to the
    turns becomes the first message; a system turn without text is left out. Raises RecordError.
    """
    turns = value.get(key) if isinstance(value, dict) else None
    return with_system(parse_turns(turns, key), system_text(value))


def parse_turns(turns: Any, where: str) -> list[Message]:
    """A list of turns, or its JSON text, as messages. where: its name in errors. Raises RecordError."""
    parsed = parse_json(turns, where)
    if not isinstance(parsed, list) or not parsed:
        raise RecordError(f"has no list of turns under {where}")
    messages = [_message(turn, f"{where}[{index}]") for index, turn in enumerate(parsed)]
    return [message for message in messages if message["role"] != "system" or message["content"]]


def check_not_python(value: Any, key: str) -> None:
    """Raise RecordError for turns or answers as Python writes them, which pandas does in columns of CSV."""
    if isinstance(value, str) and _PYTHON.match(value):
        raise RecordError(f"{key} holds lists as Python writes them; write the file as JSON or Parquet")


def parse_turns_text(value: Any) -> Any:
    """The turns in a JSON text, as a column of CSV has them; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    turns = json_or_text(value)
    is_list = isinstance(turns, list) and bool(turns)
    are_turns = is_list and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns)
    return turns if are_turns else value


def turns_of(value: Any, where: str, role: str) -> list[Message]:
    """Turns that may be given as one turn, or as the text of a turn of this role. Raises RecordError."""
    if isinstance(value, str):
        return [{"role": role, "content": check_text(value, where), "train": role == "assistant"}]
    return parse_turns([value] if isinstance(value, dict) else value, where)


def system_text(value: Any) -> str:
    """The system text next to the turns or texts of a record, or an empty text. Raises RecordError."""
    given = {key: check_text(value[key], key) for key in SYSTEM_KEYS if not is_blank(value.get(key))}
    if len(set(given.values())) > 1:
        raise RecordError(f"has different texts under {' and '.join(given)}; give one")
    return next(iter(given.values()), "")


def with_system(messages: list[Message], system: str) -> list[Message]:
    """The messages, with a system text as the first one. Raises RecordError if they have another one."""
    if not system:
        return messages
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": system, "train": False}, *messages]
    if messages[0]["content"] != system:
        raise RecordError("has a system text beside another one in its turns; give one")
    return messages


def parse_tools(value: dict[str, Any]) -> Tools:
    """The functions that a record offers, or None. A function without its envelope gets one."""
    tools = [tool for key in _TOOL_KEYS for tool in _json_list(value.get(key), key)]
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise RecordError(f"tools[{index}] is not a JSON object")
        check_surrogates(json.dumps(tool, ensure_ascii=False, default=str), f"tools[{index}]")
    return [
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool
        for tool in tools
    ] or None


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RecordError(f"{where} is not a JSON object")
    source_role = _first_given(turn, "role", "from")
    role = _ROLES.get(str(source_role).lower())
    if role is None:
        raise RecordError(f"{where} has the role {source_role!r}; known are {', '.join(_ROLES)}")
    content = _first_given(turn, "content", "value")
    if str(source_role).lower() in _CALL_ROLES:
        turn, content = {**turn, "tool_calls": content}, None
    calls = _tool_calls(turn, where)
    if calls and role != "assistant":
        raise RecordError(f"{where} is a {role} turn with tool_calls; only assistant turns call tools")
    may_be_empty = calls or role in ("system", "tool")
    return {
        "role": role,
        "content": "" if may_be_empty and is_blank(content) else _content(content, where),
        "train": _is_target(turn, role, where),
        **({"tool_calls": calls} if calls else {}),
        **_reasoning(turn, role, where),
        **{
            key: check_text(turn[key], f"{where}.{key}")
            for key in ("name", "tool_call_id")
            if not is_blank(turn.get(key))
        },
    }


def _first_given(value: Message, *keys: str) -> Any:
    """The value of the first key that holds one, or None: a column that a row lacks is null in JSON."""
    return next((value[key] for key in keys if value.get(key) is not None), None)


def _content(content: Any, where: str) -> str:
    """The text of a turn, which may be given in parts. All of them must be text."""
    if not isinstance(content, list):
        return check_text(content, where)
    texts: list[Any] = [
        _first_given(part, "text", "value") if isinstance(part, dict) and part.get("type") == "text" else part
        for part in content
    ]
    if not all(isinstance(text, str) for text in texts):
        raise RecordError(f"{where} holds something other than text")
    return check_text("".join(texts), where)


def _is_target(turn: Message, role: str, where: str) -> bool:
    """Whether a turn is to be learnt: an assistant turn, unless its weight says otherwise."""
    marks = {key: turn[key] for key in _TARGET_KEYS if turn.get(key) is not None}
    for key, mark in marks.items():
        if mark not in (0, 1):
            raise RecordError(f"{where}.{key}={mark!r} is neither 0 nor 1 (false nor true)")
        if mark and role != "assistant":
            raise RecordError(f"{where}.{key}={mark!r} marks a {role} turn; only assistant turns are targets")
    if len(set(marks.values())) > 1:
        raise RecordError(f"{where} has a weight and a train that contradict each other")
    return bool(next(iter(marks.values()), role == "assistant"))


def _reasoning(turn: Message, role: str, where: str) -> Message:
    """The reasoning of a turn under every name that chat templates read it from."""
    given = [key for key in _REASONING_KEYS if not is_blank(turn.get(key))]
    texts = {check_text(turn[key], f"{where}.{key}") for key in given}
    if len(texts) > 1:
        raise RecordError(f"{where} has different texts under {' and '.join(given)}; give one")
    if texts and role != "assistant":
        raise RecordError(f"{where} is a {role} turn with {given[0]}; only assistant turns have one")
    return dict.fromkeys(_REASONING_KEYS, texts.pop()) if texts else {}


def _tool_calls(turn: Message, where: str) -> list[dict[str, Any]]:
    return [
        _tool_call(call, f"{where}.{key}[{index}]")
        for key in _CALL_KEYS
        for index, call in enumerate(_json_list(turn.get(key), f"{where}.{key}"))
    ]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A call in its envelope, with its arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RecordError(f"{where} is not a JSON object with a function")
    arguments = _first_given(function, *_ARGUMENT_KEYS)
    arguments = {} if is_blank(arguments) else parse_json(arguments, f"{where}.arguments")
    if not isinstance(arguments, dict):
        raise RecordError(f"{where}.arguments is not a JSON object")
    check_surrogates(json.dumps(arguments, ensure_ascii=False, default=str), f"{where}.arguments")
    envelope = {"id": call["id"]} if call.get("id") else {}
    name = check_text(function.get("name"), f"{where}.name")
    return {**envelope, "type": "function", "function": {"name": name, "arguments": arguments}}


def _json_list(value: Any, where: str) -> list[Any]:
    """A list that may be given as JSON text; one object is a list of one, and nothing is an empty list."""
    if is_blank(value):
        return []
    parsed = parse_json(value, where)
    if isinstance(parsed, dict):
        return [parsed]
    if not isinstance(parsed, list | None):
        raise RecordError(f"{where} is not a list of JSON objects")
    return parsed or []


def json_or_text(text: str) -> Any:
    """The value of a JSON text; any other text as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def parse_json(value: Any, where: str) -> Any:
    """A value that may be given as JSON text, as in a column of CSV. Raises RecordError."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where} is not JSON: {error}") from error
