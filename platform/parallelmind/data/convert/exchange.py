"""A request and its response, with what precedes them, as in Alpaca, Dolly and pairs of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parallelmind.data.convert.conversation import (
    Message,
    Tools,
    parse_json,
    parse_tools,
    system_text,
    with_system,
)
from parallelmind.data.convert.source_records import check_text, is_blank, required_text
from parallelmind.data.records import RecordError

_INPUT_KEYS = ("input", "context")  # of Alpaca and of Dolly


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request and its response.

    task_input: text that an instruction works on, or an empty text. history: earlier requests and responses.
    """

    request: str
    response: str
    task_input: str = ""
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()
    tools: Tools = None

    @property
    def user_text(self) -> str:
        """The request and its input as the text of a user's turn."""
        return f"{self.request}\n\n{self.task_input}" if self.task_input else self.request

    def messages(self) -> list[Message]:
        """The exchange as a conversation whose last turn is the only target."""
        turns = exchange_turns([*self.history, (self.user_text, self.response)])
        turns[-1]["train"] = True
        return with_system(turns, self.system)

    def alpaca_prompt(self) -> str:
        """The published Alpaca prompt without its preamble, which is the same for every task.

        A system text stands in place of the preamble; earlier exchanges have the form of the last one.
        """
        if self.tools:
            raise RecordError("has tools, which only a chat template renders; set chat=true")
        system = f"{self.system}\n\n" if self.system else ""
        earlier = "".join(f"{_alpaca(request)}{response}\n\n" for request, response in self.history)
        return f"{system}{earlier}{_alpaca(self.request, self.task_input)}"

    def check_plain(self) -> None:
        """Raise RecordError if something precedes the request that plain text has no place for."""
        for name, given in (
            ("a system text", self.system),
            ("a history", self.history),
            ("tools", self.tools),
        ):
            if given:
                raise RecordError(f"has {name}, which only a chat template renders; set chat=true")


def parse_exchange(value: dict[str, Any], request_key: str, response_key: str) -> Exchange:
    """The exchange under two keys of a record, with what the record has beside it. Raises RecordError.

    An instruction may have an input, or a context as in Dolly.
    """
    input_keys = _INPUT_KEYS if request_key == "instruction" else ()
    inputs = [check_text(value[key], key) for key in input_keys if not is_blank(value.get(key))]
    return Exchange(
        required_text(value, request_key),
        required_text(value, response_key),
        "\n\n".join(inputs),
        system_text(value),
        tuple(parse_history(value.get("history"))),
        parse_tools(value),
    )


def exchange_turns(pairs: Sequence[tuple[str, str]]) -> list[Message]:
    """Pairs of a request and a response as turns of user and assistant, none of them a target."""
    return [
        {"role": role, "content": text, "train": False}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


def _alpaca(request: str, task_input: str = "") -> str:
    sections = {"Instruction": request, **({"Input": task_input} if task_input else {}), "Response": ""}
    return "\n\n".join(f"### {name}:\n{text}" for name, text in sections.items())


def parse_history(value: Any) -> list[tuple[str, str]]:
    """Earlier requests and responses, given as a list of pairs or its JSON text. Raises RecordError."""
    if is_blank(value):
        return []
    pairs = parse_json(value, "history")
    if not isinstance(pairs, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise RecordError("history is not a list of pairs of a request and a response")
    return [
        (check_text(request, f"history[{index}][0]"), check_text(response, f"history[{index}][1]"))
        for index, (request, response) in enumerate(pairs)
    ]
