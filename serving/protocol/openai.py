"""The supported part of OpenAI's request and response format.

`pm.SamplingParams` checks the ranges of sampling settings and raises their errors.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from parallelmind.config import Visibility
from serving.protocol.fields import (
    Ignored,
    Items,
    LogitBias,
    Prompts,
    Str,
    StrictRequest,
    Text,
    Texts,
    Unsupported,
)
from serving.protocol.structured import Structured
from serving.protocol.tools import ToolCall, ToolFields


class StreamOptions(StrictRequest):
    include_usage: bool = False
    include_obfuscation: Ignored = None


class Sampling(Structured):
    """Sampling settings of all requests, with OpenAI's defaults.

    The second group of fields is not part of OpenAI's format, but many servers have it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Texts | None = None
    logit_bias: LogitBias | None = None

    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False

    @field_validator("top_k")
    @classmethod
    def _minus_one_is_off(cls, value: int) -> int:
        """Many servers write "all tokens" as -1."""
        return 0 if value == -1 else value

    def sampling_fields(self, max_new_tokens: int, logprobs: int | None) -> dict[str, Any]:
        """The settings as fields of `pm.SamplingParams`."""
        own = [name for name in Sampling.model_fields if name not in Structured.model_fields]
        fields = {name: getattr(self, name) for name in own} | {"grammar": self.grammar}
        fields |= {"stop": self.stop or [], "logit_bias": self.logit_bias or {}}
        return {**fields, "max_new_tokens": max_new_tokens, "logprobs": logprobs}


def drop_nulls(schema: type[BaseModel], value: Any) -> Any:
    """In OpenAI's format null means that a field is not given."""
    if not isinstance(value, dict):
        return value
    optional = {name for name, field in schema.model_fields.items() if not field.is_required()}
    return {name: item for name, item in value.items() if item is not None or name not in optional}


class HarmlessFields(StrictRequest):
    """Fields of OpenAI's requests that do not change the answer."""

    metadata: Ignored = None
    parallel_tool_calls: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    user: Ignored = None


class OpenAIRequest(Sampling, HarmlessFields):
    """visibility: isolated: no answer depends on another one; columnar: all answers are branches of one
    sample, which attend to each other as the adapter was trained.
    """

    model: str
    visibility: Visibility = "isolated"
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Other penalties than the default are rejected; some clients always send the default.
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        return drop_nulls(cls, value)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(OpenAIRequest):
    """Every prompt is continued n times.

    main: a text that all prompts follow, which is read once.
    echo: whether the prompt is part of the answer, and its log-probabilities are too.
    """

    prompt: Prompts = Field(min_length=1)
    main: Text = ""
    max_tokens: int = 16
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @property
    def decodes_nothing(self) -> bool:
        """Whether the answer is the prompt alone."""
        return self.echo and self.max_tokens == 0

    @property
    def scores_prompt(self) -> bool:
        """Whether the answer holds the log-probabilities of the prompt."""
        return self.echo and self.logprobs is not None

    @field_validator("best_of")
    @classmethod
    def _check_best_of(cls, value: int | None, info: ValidationInfo) -> int | None:
        """All n answers are returned; none is chosen among more of them."""
        if value not in (None, info.data.get("n")):
            raise ValueError("give the value of n, or leave it out")
        return value


class TextPart(StrictRequest):
    type: Literal["text"]
    text: Str


class RefusalPart(StrictRequest):
    type: Literal["refusal"]
    refusal: Str

    @property
    def text(self) -> str:
        return self.refusal


ContentPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class Message(StrictRequest):
    """A turn of a conversation, also as clients send back what they have received.

    tool_calls: of an answer. tool_call_id: of the call whose result a message with the role tool holds.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Str | Items[ContentPart] = ""
    name: Str | None = None
    refusal: Str | None = None
    annotations: Ignored = None
    parsed: Ignored = None
    tool_calls: Items[ToolCall] | None = None
    tool_call_id: Str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        """Clients fill fields that a response does not have with nulls. Only an answer may lack a content."""
        if not isinstance(value, dict):
            return value
        is_answer = value.get("role") == "assistant"
        kept = {name: item for name, item in value.items() if item is not None}
        return kept if is_answer else {"content": None, **kept}

    @model_validator(mode="after")
    def _require_parts(self) -> Self:
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("the role tool and tool_call_id belong together; give both, or neither")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant has tool_calls; leave them out")
        return self

    def as_turn(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.text}
        turn |= {name: getattr(self, name) for name in ("name", "tool_call_id") if getattr(self, name)}
        if self.tool_calls:
            turn["tool_calls"] = [call.as_turn() for call in self.tool_calls]
        return turn

    @property
    def text(self) -> str:
        """The content, or the refusal of an answer without one."""
        if isinstance(self.content, str):
            return self.content or self.refusal or ""
        return "".join(part.text for part in self.content)


class ChatRequest(ToolFields, OpenAIRequest):
    """The conversation is answered n times.

    questions: turns of the user, of which each follows the conversation on its own; all are answered.
    """

    messages: Items[Message] = Field(min_length=1)
    questions: Items[Str] | None = Field(None, min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    modalities: Items[Literal["text"]] | None = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    functions: Unsupported = None
    function_call: Literal["none", "auto"] | None = None
    audio: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None


class TokenizeRequest(StrictRequest):
    model: str | None = None
    prompt: Str


class DetokenizeRequest(StrictRequest):
    model: str | None = None
    tokens: Items[int]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(default_factory=lambda: int(time.time()))
    owned_by: str = "parallelmind"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


def new_id(prefix: str) -> str:
    """A unique request id such as `cmpl-…`."""
    return f"{prefix}-{uuid.uuid4().hex}"
