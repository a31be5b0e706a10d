"""Conversations to text by the tokenizer's chat template; the targets begin with the assistant's turn."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from parallelmind.data.convert.source_records import ParallelRecord, check_text
from parallelmind.data.convert.token_spans import token_spans
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


def parse_messages(value: Any, key: str) -> list[Message]:
    """The turns under `key` as {"role", "content"}; in the source they may be {"from", "value"}.

    A `system` text next to the turns becomes the first message. Raises RecordError.
    """
    turns = value.get(key) if isinstance(value, dict) else None
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"has no list of turns under {key}")
    messages = [_message(turn, f"{key}[{index}]") for index, turn in enumerate(turns)]
    if value.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": check_text(value["system"], "system")})
    return messages


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise RecordError(f"{where} is not a JSON object")
    source_role = turn.get("role", turn.get("from"))
    role = _ROLES.get(source_role.lower()) if isinstance(source_role, str) else None
    if role is None:
        raise RecordError(f"{where} has the role {source_role!r}; known are {', '.join(_ROLES)}")
    content = turn.get("content", turn.get("value"))
    text = _join_parts(content, where) if isinstance(content, list) else check_text(content, where)
    return {"role": role, "content": text}


def _join_parts(parts: list[Any], where: str) -> str:
    """The text of content in parts, all of which must be text."""
    if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
        raise RecordError(f"{where} holds something other than text")
    return check_text("".join(check_text(part.get("text"), where) for part in parts), where)


class ChatRenderer:
    """Renders conversations with the chat template of a tokenizer. Raises UserError if it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"base_model={tokenizer.name_or_path}: has no chat template; give a model trained for chat"
            )
        self._tokenizer = tokenizer

    def records(self, messages: list[Message], each_turn: bool) -> Iterator[ParallelRecord]:
        """One {"text", "answer_offset"} record for the last assistant turn, or for each one.

        The first message is never an answer. Turns after the answer are excluded: they would become targets.
        Raises RecordError.
        """
        answers = [
            index for index, message in enumerate(messages) if index and message["role"] == "assistant"
        ]
        if not answers:
            raise RecordError("has no assistant turn that answers something")
        for index in answers if each_turn else answers[-1:]:
            text, prompt_length = self._render_answer(messages[:index], messages[index])
            yield {"text": text, "answer_offset": answer_offset(self._tokenizer, text, prompt_length)}

    def _render_answer(self, context: list[Message], answer: Message) -> tuple[str, int]:
        """The text, and the number of its characters before the answer."""
        text = self._render([*context, answer], add_generation_prompt=False)
        prompt = self._render(context, add_generation_prompt=True)
        if text.startswith(prompt):
            return text, len(prompt)
        # Some generation prompts hold more than a finished turn, such as the start of a reasoning section.
        if text.startswith(self._render(context, add_generation_prompt=False)):
            equal_pairs = takewhile(lambda pair: pair[0] == pair[1], zip(text, prompt, strict=False))
            return text, sum(1 for _ in equal_pairs)
        raise RecordError("is rendered differently by the chat template with and without its last turn")

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise RecordError(f"is refused by the chat template: {first_line(error)}") from error
        return str(text)


def answer_offset(tokenizer: PreTrainedTokenizerBase, text: str, prompt_length: int) -> int:
    """Index of the first token that holds none of the first `prompt_length` characters.

    The text is tokenised as in training. A token across the boundary is not a target, since decoding never
    generates it. Raises RecordError if no token is left.
    """
    spans = token_spans(tokenizer, text)
    # 1 for BOS, unless the chat template has written it.
    added_tokens = len(encode_text(tokenizer, text, first=True)) - len(spans)
    for index, start in enumerate(spans.starts):
        # White space that is excluded from a span lies in the gap before it, so the previous token must reach
        # the boundary.
        previous_end = spans.ends[index - 1] if index else 0
        if start >= prompt_length <= previous_end:
            return added_tokens + index
    raise RecordError("has no answer token that starts after the prompt")
