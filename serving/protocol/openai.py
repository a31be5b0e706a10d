"""Bodies of requests and answers in OpenAI's shapes, as far as they are served.

Ranges of sampling settings are `pm.SamplingParams`' business alone, and so are their messages.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """OpenAI's four forms as one: a text, texts, token ids, lists of token ids."""
    one = isinstance(value, str) or (
        isinstance(value, list) and value and all(type(item) is int for item in value)
    )
    return [value] if one else value


def _is_id(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdigit()


def _by_id(value: Any) -> Any:
    """JSON has no other keys than texts. Of wrong entries one is told, as of `Items`."""
    if not isinstance(value, dict):
        return value
    wrong = [key for key, bias in value.items() if not (_is_id(key) and type(bias) in (int, float))]
    return {int(key) if _is_id(key) else key: value[key] for key in wrong[:1] or value}


LogitBias = Annotated[dict[int, float], BeforeValidator(_by_id, json_schema_input_type=dict[str, float])]


def _encodable(value: str) -> str:
    """JSON can spell half a character, which is none."""
    try:
        value.encode()  # a look at every character would hold up everybody else
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate); send whole ones") from None
    return value


ItemT = TypeVar("ItemT")
Str = Annotated[str, AfterValidator(_encodable)]
Items = Annotated[
    list[ItemT], Field(fail_fast=True)
]  # one wrong item is told; to find them all in a long list takes seconds
Text = Str | Items[int]
Texts = Annotated[Items[Str], BeforeValidator(_listed, json_schema_input_type=str | list[str])]
Prompts = Annotated[Items[Text], BeforeValidator(_prompts, json_schema_input_type=Text | list[Text])]


class Request(BaseModel):
    """Unknown fields are refused: a setting that is quietly ignored is worse than an error."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _with_one_unknown(cls, value: Any) -> Any:
        """As of `Items`, one is told."""
        unknown = [name for name in value if name not in cls.model_fields] if isinstance(value, dict) else []
        return (
            {name: value[name] for name in [*cls.model_fields, unknown[0]] if name in value}
            if unknown
            else value
        )


class StreamOptions(Request):
    include_usage: bool = False


class Sampling(Request):
    """What all requests have in common. Defaults are OpenAI's; the second group is known to many servers
    beside it.
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

    def settings(self, max_new_tokens: int, logprobs: int | None) -> dict[str, Any]:
        """As fields of `pm.SamplingParams`."""
        fields = {name: getattr(self, name) for name in Sampling.model_fields}
        fields |= {"stop": self.stop or [], "logit_bias": self.logit_bias or {}}
        return {**fields, "max_new_tokens": max_new_tokens, "logprobs": logprobs}


class OpenAIRequest(Sampling):
    model: str
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Not served; clients that send every field at its default are answered all the same.
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        """OpenAI's null means that a field is not given."""
        if not isinstance(value, dict):
            return value
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: given for name, given in value.items() if given is not None or name not in optional}

    @property
    def wants_usage(self) -> bool:
        """Whether a stream should end with the usage counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(OpenAIRequest):
    """Several prompts are the branches of one sample, and so are the n answers to each."""

    prompt: Prompts = Field(min_length=1)
    max_tokens: int = 16
    logprobs: int | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] = False
    suffix: None = None


class TextPart(Request):
    type: Literal["text"]
    text: Str


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: Str | Items[TextPart]
    name: Str | None = None
    refusal: None = None  # as our own answers have it, which clients send back

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Request):
    type: Literal["text"]


class ChatRequest(OpenAIRequest):
    """n branches that share the conversation."""

    messages: Items[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: None = None
    tool_choice: Literal["none"] | None = None


class TokenizeRequest(Request):
    model: str | None = None
    prompt: Str


class DetokenizeRequest(Request):
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


class ErrorInfo(BaseModel):
    """What went wrong. param: the field of the request that is to blame, if one is."""

    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorInfo


def fresh_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
