"""Requests and responses of /v1/branches: a main and the tree of segments that follow it."""

from __future__ import annotations

from operator import not_
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from serving.protocol.fields import Items, Text
from serving.protocol.openai import Message, Sampling, Usage
from serving.protocol.structured import Structured
from serving.protocol.tools import CalledFunction, ToolFields


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
        given |= {"grammar"} if given & Structured.model_fields.keys() else set()
        return {name: value for name, value in self.all_sampling_fields().items() if name in given}


def _as_segment(value: Any) -> Any:
    """A text, or token ids, as a segment without settings of its own."""
    return {"text": value} if isinstance(value, (str, list)) else value


class Segment(BranchSettings):
    """A branch or a reduce with settings of its own, and what follows it.

    branches: they begin where the segment ends. reduce: reads them all when they have ended.
    """

    text: Text
    branches: Items[SegmentOrText] = Field([])
    reduce: SegmentOrText | None = None


SegmentOrText = Annotated[
    Segment, BeforeValidator(_as_segment, json_schema_input_type=Segment | str | list[int])
]


class Branch(BranchSettings):
    """A branch of main. It begins with a text, or with messages and the header of an answer."""

    text: Text | None = None
    messages: Items[Message] | None = Field(None, min_length=1)
    branches: Items[SegmentOrText] = Field([])
    reduce: SegmentOrText | None = None

    @model_validator(mode="after")
    def _require_one_prompt(self) -> Self:
        if (self.text is None) == (self.messages is None):
            raise ValueError("give text or messages, one of them")
        return self


def _as_branch(value: Any) -> Any:
    """A text, token ids, a message or a list of messages as a branch without settings of its own."""
    if isinstance(value, dict) and "role" in value:
        return {"messages": [value]}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {"messages": value}
    return _as_segment(value)


BranchOrPrompt = Annotated[
    Branch,
    BeforeValidator(_as_branch, json_schema_input_type=Branch | str | list[int] | Message | list[Message]),
]


class BranchesRequest(ToolFields, BranchSettings):
    """The request's settings are the defaults of all segments.

    main: a text, or messages in its place. documents: texts that are only read, by the reduce. They have no
    output in the response. tools: for the branches that are messages.
    """

    model: str
    main: Text = ""
    messages: Items[Message] | None = Field(None, min_length=1)
    documents: Items[Text] = Field([])
    branches: Items[BranchOrPrompt] = Field([], validate_default=True)
    reduce: SegmentOrText | None = None
    stream: bool = False

    @field_validator("branches")
    @classmethod
    def _require_branches(cls, branches: list[Branch], info: ValidationInfo) -> list[Branch]:
        if not branches and not info.data.get("documents"):
            raise ValueError("give at least one, or documents and a reduce")
        return branches


class ForkRequest(BranchSettings):
    """Branches that continue a running branch. The request's settings are the defaults of all segments."""

    branches: Items[SegmentOrText] = Field(min_length=1)


class SegmentPlace(BaseModel):
    """path: where the segment stands in the sample, such as `branches[0].reduce`."""

    index: int
    path: str


class AddedSegment(SegmentPlace):
    """A segment that was added to a running sample. id: the sample."""

    id: str


class ForkResponse(BaseModel):
    id: str
    branches: list[SegmentPlace]


class BranchStart(SegmentPlace):
    """Where a segment begins. branch, time: coordinates of its first prompt token."""

    prompt_tokens: int
    branch: int
    time: int


class BranchesStarted(BaseModel):
    id: str
    object: Literal["branches.begun", "branches.joined"]
    model: str
    branches: list[BranchStart]


class BranchCall(BaseModel):
    """A call of a tool in the text of a branch."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class TitledSegment(SegmentPlace):
    """A branch of a fork that the model wrote. title: its prompt."""

    title: str


class WrittenFork(BaseModel):
    """A fork that the model wrote: its branches, and the reduce that reads them all."""

    branches: list[TitledSegment]
    reduce: SegmentPlace


class Delta(SegmentPlace):
    """What one token adds to a segment.

    branch, time: the token's coordinates; null where a segment ends without a token.
    error: the reason of the finish reason "error".
    tool_calls: the calls that are complete with it; left out if there are none. Texts hold them, too.
    fork: with the finish reason "forked", if the model forked by itself; left out otherwise.
    """

    text: str
    token: int | None
    branch: int | None
    time: int | None
    finish_reason: str | None
    logprob: float | None
    top: list[tuple[int, float]]
    error: str | None = None
    tool_calls: list[BranchCall] = Field([], exclude_if=not_)
    fork: WrittenFork | None = Field(None, exclude_if=not_)


class Deltas(BaseModel):
    id: str
    object: Literal["branches.step"] = "branches.step"
    deltas: list[Delta]


class Done(BaseModel):
    id: str
    object: Literal["branches.done"] = "branches.done"
    usage: Usage


class BranchOutput(SegmentPlace):
    """The whole output of one segment, and of all that follows it.

    branch, time: coordinates of its first prompt token; null if it was cancelled before it began.
    error: the reason of the finish reason "error".
    tool_calls: the calls in the text.
    title: its prompt, if the model opened it by itself.
    """

    text: str = ""
    tokens: list[int] = Field([])
    finish_reason: str | None = None
    branch: int | None = None
    time: int | None = None
    logprobs: list[float] | None = None
    top: list[list[tuple[int, float]]] | None = None
    error: str | None = None
    tool_calls: list[BranchCall] = Field([])
    title: str | None = None
    branches: list[BranchOutput] = Field([])
    reduce: BranchOutput | None = None


class BranchesResponse(BaseModel):
    id: str
    object: Literal["branches"] = "branches"
    created: int
    model: str
    branches: list[BranchOutput]
    reduce: BranchOutput | None
    usage: Usage
