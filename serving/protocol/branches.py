"""Bodies of /v1/branches: a main and branches that each have settings of their own."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from serving.protocol.openai import Items, Sampling, Text, Usage


class BranchSettings(Sampling):
    """Defaults are the library's: greedy, 64 tokens."""

    temperature: float = 0.0
    max_tokens: int = 64
    logprobs: int | None = None

    def all(self) -> dict[str, Any]:
        """As fields of `pm.SamplingParams`."""
        return self.settings(self.max_tokens, self.logprobs)

    def own(self) -> dict[str, Any]:
        """Those alone that were given."""
        given = {"max_new_tokens" if name == "max_tokens" else name for name in self.model_fields_set}
        return {name: value for name, value in self.all().items() if name in given}


class Branch(BranchSettings):
    text: Text


class BranchesRequest(BranchSettings):
    """The settings are those of every branch that brings no others. reduce: a last branch, which reads main
    and all others.
    """

    model: str
    main: Text = ""
    branches: Items[Branch] = Field(min_length=1)
    reduce: Text | None = None
    stream: bool = False


class Delta(BaseModel):
    """What one token adds to one branch. branch, time: the token's coordinates; none where a branch ends
    without one.
    """

    index: int
    text: str
    token: int | None
    branch: int | None
    time: int | None
    finish_reason: str | None
    logprob: float | None
    top: list[tuple[int, float]]


class BranchStart(BaseModel):
    """Where a branch begins: the coordinates of its first prompt token."""

    index: int
    prompt_tokens: int
    branch: int
    time: int


class BranchesStarted(BaseModel):
    id: str
    object: Literal["branches.begun", "branches.joined"]
    model: str
    branches: list[BranchStart]


class Deltas(BaseModel):
    id: str
    object: Literal["branches.step"] = "branches.step"
    deltas: list[Delta]


class Done(BaseModel):
    id: str
    object: Literal["branches.done"] = "branches.done"
    usage: Usage


class BranchOutput(BaseModel):
    """All of one branch."""

    index: int
    text: str
    tokens: list[int]
    finish_reason: str | None
    branch: int
    time: int
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None


class BranchesAnswer(BaseModel):
    id: str
    object: Literal["branches"] = "branches"
    created: int
    model: str
    branches: list[BranchOutput]
    usage: Usage


class Joined(BaseModel):
    id: str
    index: int


class AddBranchRequest(Branch):
    """One branch more for a sample that is going on."""
