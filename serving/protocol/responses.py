"""The supported part of OpenAI's /v1/responses: text in, text out, nothing stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from serving.protocol.fields import Ignored, Items, Str, StrictRequest, Unsupported
from serving.protocol.openai import ChatRequest, HarmlessFields, Message, RefusalPart, Sampling, drop_nulls

_LOGPROBS = "message.output_text.logprobs"


class TextItem(StrictRequest):
    """A piece of text of a turn, also as a response has returned it."""

    type: Literal["input_text", "output_text"]
    text: Str
    annotations: Ignored = None
    logprobs: Ignored = None


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


class TextFormat(StrictRequest):
    type: Literal["text"]


class TextConfig(StrictRequest):
    format: TextFormat | None = None
    verbosity: Ignored = None


class ResponsesRequest(Sampling, HarmlessFields):
    """One answer to a conversation, which each request holds whole.

    include: log-probabilities are returned if "message.output_text.logprobs" is in it.
    """

    model: str
    input: Str | Items[InputMessage] = Field(min_length=1)
    instructions: Str | None = None
    max_output_tokens: int | None = None
    top_logprobs: int | None = None
    include: Items[Str] | None = None
    stream: bool = False
    stream_options: Ignored = None
    text: TextConfig | None = None
    truncation: Literal["disabled"] | None = None
    reasoning: Ignored = None
    max_tool_calls: Ignored = None
    tools: Unsupported = None
    tool_choice: Literal["none", "auto"] | None = None
    background: Literal[False] | None = None
    previous_response_id: Unsupported = None
    conversation: Unsupported = None
    context_management: Unsupported = None
    moderation: Unsupported = None
    prompt: Unsupported = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        return drop_nulls(cls, value)

    def as_chat(self) -> ChatRequest:
        """The same request to /v1/chat/completions."""
        turns = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            turns.append(Message(role="user", content=self.input))
        else:
            turns += [Message(role=turn.role, content=turn.text) for turn in self.input]
        sampling = {name: getattr(self, name) for name in Sampling.model_fields}
        return ChatRequest.model_construct(
            model=self.model,
            messages=turns,
            max_completion_tokens=self.max_output_tokens,
            logprobs=_LOGPROBS in (self.include or []) or self.top_logprobs is not None,
            top_logprobs=self.top_logprobs,
            **sampling,
        )
