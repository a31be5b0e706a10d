"""Conversations to text by the tokenizer's own chat template; the targets begin with the assistant's turn."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from parallelmind.data.convert.items import Converted, checked_text
from parallelmind.data.convert.spans import spans
from parallelmind.data.encode import encode_text
from parallelmind.data.records import RecordError
from parallelmind.errors import UserError, first_line

Message = dict[str, Any]

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


def messages_at(value: Any, key: str) -> list[Message]:
    """The turns under `key` as {"role", "content"}, be they written so or as {"from", "value"}; a `system`
    text beside them comes first. Raises RecordError.
    """
    turns = value.get(key) if isinstance(value, dict) else None
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"has no list of turns under {key}")
    messages = [_message(turn, f"{key}[{index}]") for index, turn in enumerate(turns)]
    if value.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": checked_text(value["system"], "system")})
    return messages


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RecordError(f"{where} is no JSON object")
    given = turn.get("role", turn.get("from"))
    role = _ROLES.get(given.lower()) if isinstance(given, str) else None
    if role is None:
        raise RecordError(f"{where} has the role {given!r}; known are {', '.join(_ROLES)}")
    content = turn.get("content", turn.get("value"))
    return {
        "role": role,
        "content": _joined(content, where) if isinstance(content, list) else checked_text(content, where),
    }


def _joined(parts: list[Any], where: str) -> str:
    """Content in parts, all of which must be text."""
    if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
        raise RecordError(f"{where} holds something other than text")
    return checked_text("".join(checked_text(part.get("text"), where) for part in parts), where)


class Chat:
    """The chat template of one tokenizer. Raises UserError where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"base_model={tokenizer.name_or_path}: has no chat template; give a model that was trained to chat"
            )
        self._tokenizer = tokenizer

    def records(self, messages: list[Message], each_turn: bool) -> Iterator[Converted]:
        """{"text", "answer_offset"} for the last assistant turn that follows something, or for each one.

        Turns after it are left out, as they would be targets. Raises RecordError.
        """
        answers = [
            place for place, message in enumerate(messages) if place and message["role"] == "assistant"
        ]
        if not answers:
            raise RecordError("has no assistant turn that answers something")
        for place in answers if each_turn else answers[-1:]:
            text, prefix = self._rendered(messages[:place], messages[place])
            yield {"text": text, "answer_offset": answer_offset(self._tokenizer, text, prefix)}

    def _rendered(self, before: list[Message], answer: Message) -> tuple[str, int]:
        """The text, and how many of its characters stand before the answer."""
        text = self._render([*before, answer], False)
        prompt = self._render(before, True)
        if text.startswith(prompt):
            return text, len(prompt)
        # Some templates prompt with more than a finished turn shows, the opening of a thought for one.
        if text.startswith(self._render(before, False)):
            return text, sum(
                1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, prompt, strict=False))
            )
        raise RecordError("is rendered by the chat template in another way before its last turn than with it")

    def _render(self, messages: list[Message], prompt: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise RecordError(f"is refused by the chat template: {first_line(error)}") from error
        return str(text)


def answer_offset(tokenizer: PreTrainedTokenizerBase, text: str, prefix: int) -> int:
    """Index, as training tokenises `text`, of the first token that holds none of its first `prefix`
    characters.

    A token across the border is no target, since decoding never writes it. Raises RecordError where no token
    is left.
    """
    found = spans(tokenizer, text)
    opened = len(encode_text(tokenizer, text, first=True)) - len(found)  # BOS, unless the template wrote it
    for index, start in enumerate(found.starts):
        # White space left out of a span lies in the gap before it: the token is free only if the one before
        # reaches the border.
        before = found.ends[index - 1] if index else 0
        if start >= prefix <= before:
            return opened + index
    raise RecordError("has no token of the answer that is free of the text before it")
