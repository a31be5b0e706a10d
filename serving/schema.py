"""OpenAI's shapes, as far as they are served. Ranges of sampling settings are `pm.SamplingParams`' business alone."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])]


class Request(BaseModel):
    """Unknown fields are refused: a setting that is quietly ignored is worse than an error."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Request):
    include_usage: bool = False


class CompletionRequest(Request):
    """Several prompts are the branches of one sample. Defaults are OpenAI's."""

    model: str
    prompt: Texts = Field(min_length=1)
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Texts | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Not served; clients that send every field at its default are answered all the same.
    n: Literal[1] = 1
    best_of: Literal[1] | None = None
    echo: Literal[False] = False
    suffix: None = None
    logprobs: None = None
    logit_bias: None = None
    frequency_penalty: float = Field(0, ge=0, le=0)
    presence_penalty: float = Field(0, ge=0, le=0)

    def sampling(self) -> dict[str, Any]:
        """As fields of `pm.SamplingParams`."""
        return {
            "max_new_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": self.stop or [],
        }

    @property
    def wants_usage(self) -> bool:
        """Whether a stream should end with the usage counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class Choice(BaseModel):
    """Text of one branch: all of it, or in a stream what is new."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: str | None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Usage:
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class Completion(BaseModel):
    """An answer, or one part of a streamed one."""

    id: str = Field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[Choice] = []
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(default_factory=lambda: int(time.time()))
    owned_by: str = "parallelmind"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Problem(BaseModel):
    """What went wrong. param: the field of the request that is to blame, if one is."""

    message: str
    type: Literal["invalid_request_error", "server_error"] = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: Problem
