"""The input of /v1/responses: turns of a conversation, calls of tools and their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from serving.protocol.fields import Ignored, Items, Str, StrictRequest, Unsupported
from serving.protocol.openai import Message, RefusalPart
from serving.protocol.tools import CalledFunction, Name, ToolCall, check_object


class TextItem(StrictRequest):
    """A piece of text of a turn, also as a response has returned it."""

    type: Literal["input_text", "output_text"]
    text: Str
    annotations: Ignored = None
    logprobs: Ignored = None
    parsed: Ignored = None


class InputMessage(StrictRequest):
    """A turn of the conversation, also as a response has returned it."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Str | Items[Annotated[TextItem | RefusalPart, Field(discriminator="type")]]
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in self.content)


class _CallPart(StrictRequest):
    """What a call and its output have in common. call_id: connects them."""

    call_id: Str
    id: Ignored = None
    status: Ignored = None
    caller: Unsupported = None
    namespace: Unsupported = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        """Clients fill fields that a response does not have with nulls, some under names of their own."""
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class FunctionCallItem(_CallPart):
    """A call that an earlier response made."""

    type: Literal["function_call"]
    name: Name
    arguments: Annotated[Str, AfterValidator(check_object)]
    parsed_arguments: Ignored = None
    async_: Unsupported = Field(None, alias="async")

    def as_call(self) -> ToolCall:
        return ToolCall(id=self.call_id, function=CalledFunction(name=self.name, arguments=self.arguments))


class FunctionCallOutput(_CallPart):
    """The result of a call."""

    type: Literal["function_call_output"]
    output: Str | Items[TextItem]
    name: Ignored = None

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


def _tag(item: Any) -> str:
    """The type of an item, which a message may leave out. The brackets keep it out of the names of fields."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "message")
    return f"[{kind}]"


InputItem = Annotated[
    Annotated[InputMessage, Tag("[message]")]
    | Annotated[FunctionCallItem, Tag("[function_call]")]
    | Annotated[FunctionCallOutput, Tag("[function_call_output]")],
    Discriminator(
        _tag,
        custom_error_type="input_item",
        custom_error_message="is no message, function_call or function_call_output; leave it out",
    ),
]


def chat_messages(items: Sequence[InputMessage | FunctionCallItem | FunctionCallOutput]) -> list[Message]:
    """The items as turns of a chat, in which calls are a part of the assistant's turn before them."""
    turns: list[Message] = []
    for item in items:
        if isinstance(item, InputMessage):
            turns.append(Message(role=item.role, content=item.text))
        elif isinstance(item, FunctionCallOutput):
            turns.append(Message(role="tool", content=item.text, tool_call_id=item.call_id))
        else:
            if not turns or turns[-1].role != "assistant":
                turns.append(Message(role="assistant"))
            calls = [*(turns[-1].tool_calls or []), item.as_call()]
            turns[-1] = turns[-1].model_copy(update={"tool_calls": calls})
    return turns
