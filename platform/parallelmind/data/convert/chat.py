"""Conversations to text by the tokenizer's chat template; the targets begin with the assistant's turn."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from parallelmind.data.convert.conversation import Message, Tools
from parallelmind.data.convert.render_check import check_rendered, common_length, in_template_form
from parallelmind.data.convert.source_records import ParallelRecord
from parallelmind.data.convert.token_spans import token_spans
from parallelmind.data.encode import encode_text
from parallelmind.data.records import RecordError
from parallelmind.errors import UserError, first_line


class ChatRenderer:
    """Renders conversations with the chat template of a tokenizer. Raises UserError if it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"base_model={tokenizer.name_or_path}: has no chat template; give a model trained for chat"
            )
        self._tokenizer = tokenizer

    def records(
        self, messages: list[Message], each_turn: bool, tools: Tools = None
    ) -> Iterator[ParallelRecord]:
        """One {"text", "answer_offset"} record for the last assistant turn, or for each one.

        The first message is never an answer, nor is one whose `train` is false. Turns after the answer are
        excluded: they would become targets. Raises RecordError.
        """
        answers = [
            index
            for index, message in enumerate(messages)
            if index and message["role"] == "assistant" and message.get("train", True)
        ]
        if not answers:
            raise RecordError("has no assistant turn that answers something and is to be learnt")
        for index in answers if each_turn else answers[-1:]:
            yield in_template_form(messages[: index + 1], partial(self._record, tools))

    def _record(self, tools: Tools, messages: list[Message]) -> ParallelRecord:
        text, prompt_length = self._render_answer(messages[:-1], messages[-1], tools)
        check_rendered(messages, tools, {len(messages) - 1}, self._render)
        return {"text": text, "answer_offset": answer_offset(self._tokenizer, text, prompt_length)}

    def _render_answer(self, context: list[Message], answer: Message, tools: Tools) -> tuple[str, int]:
        """The text, and the number of its characters before the answer."""
        text = self._render([*context, answer], tools)
        prompt = self._render(context, tools, add_generation_prompt=True)
        if text.startswith(prompt):
            return text, len(prompt)
        # Some generation prompts hold more than a finished turn, such as the start of a reasoning section.
        if text.startswith(self._render(context, tools)):
            return text, common_length(text, prompt)
        raise RecordError("is rendered differently by the chat template with and without its last turn")

    def _render(self, messages: list[Message], tools: Tools, add_generation_prompt: bool = False) -> str:
        template_messages = [{key: turn[key] for key in turn if key != "train"} for turn in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                template_messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
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
