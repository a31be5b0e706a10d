"""Messages between the ingress and the engine replicas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from parallelmind.engine.fork_parser import Fork
from parallelmind.engine.output import Event, TokenLogprob
from parallelmind.engine.request import AddedSegments, ResumeState, TokenizedRequest

_TOP, _POS2D, _PROMPT, _FORK = map(Event._fields.index, ("top", "pos2d", "prompt", "fork"))


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One or more samples to decode for one response.

    The branches of all samples are counted in one sequence, which `StepOutput` and `ResumeState` refer to.

    id: unique; names a request of one sample when segments are added, and any request when it is cancelled.
    model: the model's name as the client gave it.
    prompt_tokens: as the client counts them; None: of main and of every branch that starts.
    resume, adapter_version: where a lost engine stopped, and the version of the adapter that it used.
    added: the indices of the segments that calls added there, by the keys of those calls.
    history: what the client may have got, so that it can come back for the rest; None if it cannot.
    """

    id: str
    model: str
    samples: list[TokenizedRequest]
    prompt_tokens: int | None = None
    resume: ResumeState | None = None
    adapter_version: str | None = None
    added: Mapping[str, list[int]] = field(default_factory=dict)
    history: StreamHistory | None = None

    def with_history(self) -> EngineRequest:
        """The request of a new stream, which its client can come back to."""
        return StreamHistory(self).resumed()

    def repeats(self, other: EngineRequest) -> bool:
        """Whether it asks for the same kind of response to the same texts."""
        return self._asked() == other._asked()

    def _asked(self) -> tuple[object, ...]:
        return self.id.partition("-")[0], self.model, [sample.tokens.split() for sample in self.samples]

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of all samples, as the client counts them."""
        if self.prompt_tokens is not None:
            return self.prompt_tokens
        return sum(sample.num_prompt_tokens for sample in self.samples)

    @property
    def num_branches(self) -> int:
        """Segments after main, of all samples."""
        return sum(sample.num_branches for sample in self.samples)

    def unfinished(self) -> Iterator[tuple[int, TokenizedRequest, ResumeState | None]]:
        """The samples to decode: index of the first branch, the sample, and where it is resumed."""
        first = 0
        for sample in self.samples:
            end = first + sample.num_branches
            resume = None if self.resume is None else self.resume.part(first, end)
            if resume is None or not resume.is_complete:
                yield first, sample, resume
            first = end

    @property
    def prompts(self) -> list[list[int]]:
        """Prompt token ids of every branch."""
        return [prompt for sample in self.samples for prompt in sample.tokens.split()[1:]]


class BranchStarted(NamedTuple):
    """A segment begins. branch: its index. pos2d: branch and time coordinate of its first prompt token."""

    branch: int
    pos2d: tuple[int, int]


class StepOutput(NamedTuple):
    """What one engine step adds to one request.

    started: segments that begin before the events. The first event of any other segment tells its start.
    added: segments that are added before the others begin.
    adapter_version: set on the first output of a stream.
    """

    events: list[Event]
    started: Sequence[BranchStarted] = ()
    added: Sequence[AddedSegments] = ()
    adapter_version: str | None = None


PackedStep = tuple[list[tuple[Any, ...]], Sequence[BranchStarted], Sequence[AddedSegments], str | None]


def pack_step(step: StepOutput) -> PackedStep:
    """Plain tuples, which Serve's pickler writes faster than named ones."""
    return [tuple(event) for event in step.events], *step[1:]


def unpack_step(packed: PackedStep) -> StepOutput:
    events, started, added, adapter_version = packed
    return StepOutput(list(map(Event._make, events)), started, added, adapter_version)


def step_of_json(packed: Sequence[Any]) -> PackedStep:
    """A packed step without added segments that has become JSON, which has neither tuples nor types."""
    events, started, added, adapter_version = packed
    for event in events:
        event[_TOP] = tuple(map(tuple, event[_TOP]))
        event[_POS2D] = event[_POS2D] and tuple(event[_POS2D])
        event[_PROMPT] = tuple(
            TokenLogprob(token, logprob, tuple(map(tuple, top))) for token, logprob, top in event[_PROMPT]
        )
        if event[_FORK]:
            titles, branches, reduce = event[_FORK]
            event[_FORK] = Fork(tuple(titles), tuple(branches), reduce)
    starts = tuple(BranchStarted(branch, tuple(pos2d)) for branch, pos2d in started)
    return list(map(tuple, events)), starts, tuple(added), adapter_version


def num_items(step: PackedStep) -> int:
    """A measure of the memory that a step takes: one for some hundred bytes."""
    events, *rest = step
    return sum(map(bool, rest)) + sum(1 + len(event[_TOP]) + len(event[_PROMPT]) for event in events)


class StreamHistory(NamedTuple):
    """A stream so far: the request as it began, and all of its steps."""

    request: EngineRequest
    steps: Sequence[PackedStep] = ()

    @property
    def length(self) -> tuple[int, int]:
        """Number of engines and of steps. Of two histories of a stream the greater one is the later one.

        The first step of every engine tells the version of the adapter.
        """
        return sum(version is not None for *_, version in self.steps), len(self.steps)

    def resumed(self) -> EngineRequest:
        """The request that resumes the stream, and begins with its history."""
        return replace(self.request, history=self)


class StreamKey(NamedTuple):
    """Names a stream of steps. reader: the ingress process. number: one of its streams."""

    reader: bytes
    number: int


class StepsAt(NamedTuple):
    """Where an ingress process gets the steps of all its streams of an engine.

    reader_key, sender_key: what the ingress and the engine show to each other.
    """

    host: str
    port: int
    reader_key: bytes
    sender_key: bytes


class RejectedRequest(NamedTuple):
    """Why a request is not served.

    A return value and not an exception: Serve logs the traceback of every exception as a failure.
    """

    message: str
    status: int = 400
