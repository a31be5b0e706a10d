"""Conversations to text by the tokenizer's chat template; the targets are the assistant's turns."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from parallelmind.data.convert.answers import split_prompt
from parallelmind.data.convert.conversation import Message, Tools
from parallelmind.data.convert.render_check import (
    TemplateRefusedError,
    check_rendered,
    common_length,
    in_template_form,
)
from parallelmind.data.convert.source_records import ParallelRecord
from parallelmind.data.convert.token_spans import TokenSpans, token_spans
from parallelmind.data.encode import TEMPLATE_ERRORS, bos_ids, encode_texts, prepend_bos
from parallelmind.data.records import RecordError
from parallelmind.errors import UserError, UserNotice, first_line

if TYPE_CHECKING:  # a model library takes seconds to import
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RenderedAnswer:
    """An answer as the chat template writes it, with its end token, and the two parts of what precedes it.

    main: of parallel JSONL, the conversation before the answer. header: opens the answer's turn.
    """

    main: str | dict[str, list[int]]
    header: str
    text: str


class ChatRenderer:
    """Renders conversations with the chat template of a tokenizer. Raises UserError if it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"base_model={tokenizer.name_or_path}: has no chat template; give a model trained for chat"
            )
        self._tokenizer = tokenizer

    def records(
        self,
        messages: list[Message],
        each_turn: bool = False,
        tools: Tools = None,
        all_turns: bool = False,
    ) -> Iterator[ParallelRecord]:
        """A {"text", "targets", "rendered"} record whose target is the last assistant turn.

        each_turn: one record per assistant turn. all_turns: one record whose targets are all of them. The
        first message is never an answer, nor is one whose `train` is false. Turns after the last answer are
        left out. The token ids in training are those of `apply_chat_template`. Raises RecordError.
        """
        answers = _answers(messages)
        targets = [answers] if all_turns else [[index] for index in answers]
        for turns in targets if each_turn else targets[-1:]:
            yield in_template_form(messages[: turns[-1] + 1], partial(self._record, tools, turns))

    def last_answer(self, messages: list[Message], tools: Tools = None) -> RenderedAnswer:
        """The last assistant turn that is to be learnt, and what precedes it. Raises RecordError."""
        return in_template_form(messages[: _answers(messages)[-1] + 1], partial(self._last_answer, tools))

    def _last_answer(self, tools: Tools, messages: list[Message]) -> RenderedAnswer:
        text = self._render(messages, tools)
        context = self._render(messages[:-1], tools)
        prompt = text[: self._prompt_length(text, messages[:-1], tools)]
        check_rendered(messages, tools, {len(messages) - 1}, self._render)
        main, header = prompt[: len(context)], prompt[len(context) :]
        if not header or not prompt.startswith(context):
            main, header = split_prompt(prompt)
        return RenderedAnswer(self._main(main), header, self._without_text_after_end(text[len(prompt) :]))

    def _main(self, text: str) -> str | dict[str, list[int]]:
        """Main as text, or as token ids if the text would get a BOS that the template does not write."""
        (ids,) = encode_texts(self._tokenizer, [text])
        return text if ids == prepend_bos(ids, bos_ids(self._tokenizer)) else {"input_ids": ids}

    def _without_text_after_end(self, answer: str) -> str:
        """The answer without the white space that the template writes after the end token."""
        stripped = answer.rstrip()
        (ids,) = encode_texts(self._tokenizer, [stripped])
        return stripped if ids and ids[-1] in self._added_tokens else answer

    def _record(self, tools: Tools, answers: list[int], messages: list[Message]) -> ParallelRecord:
        """One record with the answers at these indices as targets."""
        text = self._render(messages, tools)
        ids = token_spans(self._tokenizer, text).ids
        targets = [list(self._answer_tokens(ids, messages[: index + 1], tools)) for index in answers]
        check_rendered(messages, tools, set(answers), self._render)
        return {"text": text, "targets": targets, "rendered": True}

    def _answer_tokens(self, ids: list[int], turns: list[Message], tools: Tools) -> tuple[int, int]:
        """First and last token (excluded) of the answer that ends `turns`, in a longer conversation `ids`."""
        text = self._render(turns, tools)
        spans = token_spans(self._tokenizer, text)
        start = first_target(spans, self._prompt_length(text, turns[:-1], tools))
        end = common_length(spans.ids, ids)
        if end <= start or not all(map(self._is_mark, spans.ids[end:])):
            raise RecordError(
                "has an answer that the chat template renders differently once a turn follows it, so not all "
                "turns can be targets of one record; set each_turn=true"
            )
        last = self._without_final_space(ids, start, end)
        if self._added_tokens.isdisjoint([ids[last - 1], *spans.ids[end:]]):
            self._tell("writes no special token after an answer, so decoding does not learn to stop there")
        return start, last

    def _prompt_length(self, text: str, context: list[Message], tools: Tools) -> int:
        """Number of characters of the text before its last turn, which is the answer."""
        prompt = self._render(context, tools, add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        if not text.startswith(self._render(context, tools)):
            raise RecordError("is rendered differently by the chat template with and without its last turn")
        length = common_length(text, prompt)
        self._tell(f"begins an answer with {prompt[length:]!r} in decoding, and without it in training")
        return length

    def _without_final_space(self, ids: list[int], start: int, end: int) -> int:
        """The end of an answer without the white space that the template writes after the end token."""
        last = end
        while last > start and self._is_blank(ids[last - 1]):
            last -= 1
        return last if last > start and ids[last - 1] in self._added_tokens else end

    def _tell(self, notice: str) -> None:
        """Warn about the chat template, once for each notice."""
        model = self._tokenizer.name_or_path
        warnings.warn(f"base_model={model}: its chat template {notice}", UserNotice, stacklevel=2)

    def _is_mark(self, token: int) -> bool:
        """Whether a token is white space or an added token, such as one that ends a turn."""
        return token in self._added_tokens or self._is_blank(token)

    def _is_blank(self, token: int) -> bool:
        return not str(self._tokenizer.decode([token])).strip()

    @cached_property
    def _added_tokens(self) -> frozenset[int]:
        return frozenset(self._tokenizer.added_tokens_decoder)

    def _render(self, messages: list[Message], tools: Tools, add_generation_prompt: bool = False) -> str:
        template_messages = [{key: turn[key] for key in turn if key != "train"} for turn in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                template_messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TEMPLATE_ERRORS as error:
            raise TemplateRefusedError(f"is refused by the chat template: {first_line(error)}") from error
        return str(text)


def _answers(messages: list[Message]) -> list[int]:
    """Indices of the turns that are to be learnt. Raises RecordError if there is none."""
    answers = [
        index
        for index, message in enumerate(messages)
        if index and message["role"] == "assistant" and message.get("train", True)
    ]
    if not answers:
        raise RecordError("has no assistant turn that answers something and is to be learnt")
    return answers


def first_target(spans: TokenSpans, prompt_length: int) -> int:
    """Index of the first token that holds none of the first `prompt_length` characters.

    A token across the boundary is not a target, since decoding never generates it. Raises RecordError if no
    token is left.
    """
    for index, start in enumerate(spans.starts):
        # White space that is excluded from a span lies in the gap before it, so the previous token must reach
        # the boundary.
        previous_end = spans.ends[index - 1] if index else 0
        if start >= prompt_length <= previous_end:
            return index
    raise RecordError("has no answer token that starts after the prompt")
