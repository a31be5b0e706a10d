"""Requests and responses of /v1/branches: a main, and branches with individual settings."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from serving.protocol.fields import Items, Text
from serving.protocol.openai import Message, Sampling, Usage


class BranchSettings(Sampling):
    """Sampling settings with the library's defaults: greedy, 64 tokens."""

    temperature: float = 0.0
    max_tokens: int = 64
    logprobs: int | None = None

    def all_sampling_fields(self) -> dict[str, Any]:
        """All settings as fields of `pm.SamplingParams`."""
        return self.sampling_fields(self.max_tokens, self.logprobs)

    def given_sampling_fields(self) -> dict[str, Any]:
        """The settings that the request holds."""
        given = {"max_new_tokens" if name == "max_tokens" else name for name in self.model_fields_set}
        return {name: value for name, value in self.all_sampling_fields().items() if name in given}


class BranchPrompt(BranchSettings):
    text: Text


class Branch(BranchSettings):
    """A branch begins with a text, or with messages and the header of an answer.

    A text, a message or a list of messages stands for a branch without settings of its own.
    """

    text: Text | None = None
    messages: Items[Message] | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _from_prompt(cls, value: Any) -> Any:
        if isinstance(value, dict) and "role" in value:
            return {"messages": [value]}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return {"messages": value}
        return {"text": value} if isinstance(value, (str, list)) else value

    @model_validator(mode="after")
    def _require_one_prompt(self) -> Self:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give text or messages, one of them")
        return self


class BranchesRequest(BranchSettings):
    """The request's settings are the defaults of its branches.

    main: a text, or messages in its place.
    reduce: prompt of a last branch, which reads main and all branches after they have ended.
    """

    model: str
    main: Text = ""
    messages: Items[Message] | None = Field(None, min_length=1)
    branches: Items[Branch] = Field(min_length=1)
    reduce: Text | None = None
    stream: bool = False


class AddBranchRequest(BranchPrompt):
    """A further branch for a running sample."""


class AddBranchResponse(BaseModel):
    id: str
    index: int


class BranchStart(BaseModel):
    """Where a branch begins. branch, time: coordinates of its first prompt token."""

    index: int
    prompt_tokens: int
    branch: int
    time: int


class BranchesStarted(BaseModel):
    id: str
    object: Literal["branches.begun", "branches.joined"]
    model: str
    branches: list[BranchStart]


class Delta(BaseModel):
    """What one token adds to a branch.

    branch, time: the token's coordinates; null where a branch ends without a token.
    error: the reason of the finish reason "error".
    """

    index: int
    text: str
    token: int | None
    branch: int | None
    time: int | None
    finish_reason: str | None
    logprob: float | None
    top: list[tuple[int, float]]
    error: str | None = None


class Deltas(BaseModel):
    id: str
    object: Literal["branches.step"] = "branches.step"
    deltas: list[Delta]


class Done(BaseModel):
    id: str
    object: Literal["branches.done"] = "branches.done"
    usage: Usage


class BranchOutput(BaseModel):
    """The whole output of one branch. error: the reason of the finish reason "error"."""

    index: int
    text: str
    tokens: list[int]
    finish_reason: str | None
    branch: int
    time: int
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None
    error: str | None = None


class BranchesResponse(BaseModel):
    id: str
    object: Literal["branches"] = "branches"
    created: int
    model: str
    branches: list[BranchOutput]
    usage: Usage
