"""Conversations as token ids, by the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

import parallelmind as pm
from parallelmind.data.encode import encode_continuations, encode_texts
from parallelmind.errors import first_line
from serving.ingress.independent import common_beginning
from serving.ingress.tool_prompts import JsonTool, ToolPrompts, Turn
from serving.protocol.openai import Message
from serving.protocol.tools import Tool

_PROBES = ("0", "?")  # contents that have nothing in common


class Fork(NamedTuple):
    """The token ids of a conversation: what does not depend on its last turns, and the rest."""

    main: list[int]
    rest: list[int]


class ChatPrompts:
    """Writes conversations with the chat template. Methods raise UserError for what the template refuses."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.tools = ToolPrompts(lambda turns, tools: self._render(turns, False, tools))

    def turns(
        self, messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> tuple[list[Turn], list[JsonTool]]:
        """The messages and tools as the template takes them. Raises UserError for a name that it ignores."""
        turns, shown = self.tools.turns([message.as_turn() for message in messages], tools)
        first = len(turns) - len(messages)  # a prompt of ours may stand before them
        for index, turn in enumerate(turns):
            if "name" in turn and turn["role"] != "tool":
                nameless = [*turns]
                nameless[index] = {field: value for field, value in turn.items() if field != "name"}
                if self._render(nameless, False, shown) == self._render(turns, False, shown):
                    raise pm.UserError(
                        f"messages[{index - first}].name={turn['name']!r}: the model's chat template does "
                        "not read names; leave it out, or write it into the content"
                    )
        return turns, shown

    def ids(self, turns: Sequence[Turn], tools: Sequence[JsonTool] = ()) -> list[int]:
        """The conversation without the header of an answer."""
        return encode_texts(self._tokenizer, [self._render(turns, False, tools)])[0]

    def conversation(self, turns: Sequence[Turn], tools: Sequence[JsonTool] = ()) -> Fork:
        """The conversation, and the header of the assistant's turn.

        Together they are those of `apply_chat_template`: the template has written all special tokens.
        """
        texts = [self._render(turns, header, tools) for header in (False, True)]
        without_header, ids = encode_texts(self._tokenizer, texts)
        length = len(without_header)
        if not 0 < length < len(ids) or ids[:length] != without_header:
            length = len(ids) - 1  # the conversation is rendered or tokenised differently without the header
        return Fork(ids[:length], ids[length:])

    def forks(
        self,
        turns: Sequence[Turn],
        branches: Sequence[Sequence[Turn]],
        tools: Sequence[JsonTool] = (),
        continues: bool = False,
    ) -> list[Fork]:
        """The conversation with the turns of each branch and the header of the answer.

        All that the template writes before the first content of a branch is main: the turns, and the marker
        of the user's turn. Main is shorter only for a branch that begins otherwise, or with characters that
        share a token with the marker. So a fork depends on its own turns alone.
        continues: whether another text stands before the conversation.
        """
        if not branches:
            return []
        encode = encode_continuations if continues else encode_texts
        texts = [self._render([*turns, *branch], True, tools) for branch in branches]
        whole = encode(self._tokenizer, texts)
        try:
            probes = [self._render([*turns, user_turn(content)], True, tools) for content in _PROBES]
        except pm.UserError:  # a template that takes no turn of the user here
            stem = common_beginning(whole)
        else:
            stem = common_beginning(encode(self._tokenizer, probes))
        cuts = [len(common_beginning([stem, ids[:-1]])) for ids in whole]
        return [Fork(ids[:cut], ids[cut:]) for ids, cut in zip(whole, cuts, strict=True)]

    def _render(self, turns: Sequence[Turn], header: bool, tools: Sequence[JsonTool] = ()) -> str:
        """The conversation by the model's template. header: whether the assistant's turn begins after it.

        tools: for a template that shows them to the model.
        """
        if not self._tokenizer.chat_template:
            raise pm.UserError("messages: the model has no chat template; use /v1/completions")
        shown: dict[str, Any] = {"tools": list(tools)} if tools else {}
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(turns), tokenize=False, add_generation_prompt=header, **shown
                )
            )
        except Exception as error:  # a template is a program of the model and may raise anything
            raise pm.UserError(
                f"messages: the model's chat template refuses them ({first_line(error)}); change them"
            ) from error


def user_turn(content: str) -> Turn:
    return {"role": "user", "content": content}
