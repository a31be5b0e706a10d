"""The supported part of OpenAI's /v1/responses: text and calls of tools, nothing stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

import parallelmind as pm
from parallelmind.engine.grammar import Grammar
from serving.protocol.fields import Ignored, Items, Str, StrictRequest, Unsupported
from serving.protocol.openai import ChatRequest, HarmlessFields, Message, Sampling, drop_nulls
from serving.protocol.responses_input import InputItem, chat_messages
from serving.protocol.strict_json import AnyJson, JsonObject
from serving.protocol.structured import NamedSchema, ResponseFormat
from serving.protocol.tools import MAX_TOOLS, Function, FunctionName, Name, NamedTool, Tool

_LOGPROBS = "message.output_text.logprobs"


class FunctionTool(StrictRequest):
    """parameters: JSON schema of the arguments."""

    type: Literal["function"]
    name: Name
    description: Str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None
    allowed_callers: Unsupported = None
    async_: Unsupported = Field(None, alias="async")
    defer_loading: Literal[False] | None = None
    output_schema: Ignored = None

    def as_tool(self) -> Tool:
        fields = self.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        return Tool(type="function", function=Function.model_validate(fields))


class FunctionChoice(StrictRequest):
    type: Literal["function"]
    name: Name


class TextFormat(StrictRequest):
    """name, schema, strict, description: of the type json_schema, which needs the first two."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None
    description: Str | None = None

    @model_validator(mode="after")
    def _require_schema(self) -> TextFormat:
        is_schema = self.type == "json_schema"
        if is_schema != (self.schema_ is not None) or is_schema != (self.name is not None):
            raise ValueError("name and schema belong to the type json_schema; give all, or none")
        return self

    def as_response_format(self) -> ResponseFormat:
        if self.schema_ is None:
            return ResponseFormat(type=self.type)
        return ResponseFormat(
            type=self.type, json_schema=NamedSchema(name=self.name or "", schema=self.schema_)
        )


class TextConfig(StrictRequest):
    format: TextFormat | None = None
    verbosity: Ignored = None


class ResponsesRequest(Sampling, HarmlessFields):
    """One answer to a conversation, which each request holds whole.

    include: log-probabilities are returned if "message.output_text.logprobs" is in it.
    """

    model: str
    metadata: AnyJson = None
    user: AnyJson = None
    input: Str | Items[InputItem] = Field(min_length=1)
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
    tools: Annotated[Items[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool = True
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

    @property
    def grammar(self) -> Grammar | None:
        """Raises UserError as `Structured` does, and for `text.format` beside one of its fields."""
        other = super().grammar
        if self.text is None or self.text.format is None:
            return other
        if other is not None:
            raise pm.UserError(f"text.format: {other.field} is given too; give one of them")
        return self.text.format.as_response_format().grammar()

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools in a response."""
        fields = ("type", "name", "description", "parameters", "strict")
        return [{field: getattr(tool, field) for field in fields} for tool in self.tools or []]

    @property
    def shown_choice(self) -> str | dict[str, Any]:
        choice = self.tool_choice
        return choice.model_dump() if isinstance(choice, FunctionChoice) else choice or "auto"

    @property
    def shown_format(self) -> dict[str, Any]:
        text_format = TextFormat() if self.text is None or self.text.format is None else self.text.format
        return text_format.model_dump(by_alias=True, exclude_none=True)

    def as_chat(self) -> ChatRequest:
        """The same request to /v1/chat/completions. Raises UserError for two grammars."""
        turns = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            turns.append(Message(role="user", content=self.input))
        else:
            turns += chat_messages(self.input)
        sampling = {name: getattr(self, name) for name in Sampling.model_fields}
        if self.grammar is not None and self.text is not None and self.text.format is not None:
            sampling["response_format"] = self.text.format.as_response_format()
        return ChatRequest.model_construct(
            model=self.model,
            messages=turns,
            max_completion_tokens=self.max_output_tokens,
            logprobs=_LOGPROBS in (self.include or []) or self.top_logprobs is not None,
            top_logprobs=self.top_logprobs,
            tools=[tool.as_tool() for tool in self.tools or []],
            tool_choice=self._chat_choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            **sampling,
        )

    def _chat_choice(self) -> Literal["none", "auto", "required"] | NamedTool | None:
        if isinstance(self.tool_choice, FunctionChoice):
            return NamedTool(type="function", function=FunctionName(name=self.tool_choice.name))
        return self.tool_choice
