"""Messages between the ingress and the engine replicas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, NamedTuple

from parallelmind.engine.output import Event
from parallelmind.engine.request import ResumeState, TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams

_EVENT_FIELDS = [each.name for each in fields(Event)]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One or more samples to decode for one response.

    The branches of all samples are counted in one sequence, which `StepOutput` and `ResumeState` refer to.

    id: unique; names a request of one sample when a branch is added, and any request when it is cancelled.
    model: the model's name as the client gave it.
    prompt_tokens: as the client counts them; None: of main and of every branch that starts.
    resume, adapter_version: where a lost engine stopped, and the version of the adapter that it used.
    joined: the indices of branches that were added there, by the keys of those calls.
    """

    id: str
    model: str
    samples: list[TokenizedRequest]
    prompt_tokens: int | None = None
    resume: ResumeState | None = None
    adapter_version: str | None = None
    joined: Mapping[str, int] = field(default_factory=dict)

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
    """A branch begins. pos2d: branch and time coordinate of its first prompt token.

    key: of the call that added the branch; None if the request holds it.
    """

    branch: int
    prompt: list[int]
    params: SamplingParams
    pos2d: tuple[int, int]
    key: str | None = None


class StepOutput(NamedTuple):
    """What one engine step adds to one request.

    started: branches that begin before the events. adapter_version: set on the first output of a stream.
    """

    events: list[Event]
    started: list[BranchStarted]
    adapter_version: str | None = None


PackedStep = tuple[list[tuple[Any, ...]], list[BranchStarted], str | None]


def pack_step(step: StepOutput) -> PackedStep:
    """Plain tuples, which Serve's pickler writes ten times as fast as dataclasses."""
    return [attrgetter(*_EVENT_FIELDS)(event) for event in step.events], step.started, step.adapter_version


def unpack_step(packed: PackedStep) -> StepOutput:
    events, started, adapter_version = packed
    return StepOutput([Event(*values) for values in events], started, adapter_version)


class RejectedRequest(NamedTuple):
    """Why a request is not served.

    A return value and not an exception: Serve logs the traceback of every exception as a failure.
    """

    message: str
    status: int = 400
