"""Messages between the ingress and the engine replicas."""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NamedTuple

from parallelmind.engine.output import Event
from parallelmind.engine.request import ResumeState, TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams

_EVENT_FIELDS = [field.name for field in fields(Event)]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sample to decode.

    id: unique; names the sample when a branch is added or cancelled.
    model: the model's name as the client gave it.
    resume, adapter_version: where a lost engine stopped, and the version of the adapter that it used.
    """

    id: str
    model: str
    tokenized: TokenizedRequest
    resume: ResumeState | None = None
    adapter_version: str | None = None


class BranchStarted(NamedTuple):
    """A branch begins. pos2d: branch and time coordinate of its first prompt token."""

    branch: int
    prompt: list[int]
    params: SamplingParams
    pos2d: tuple[int, int]


class StepOutput(NamedTuple):
    """What one engine step adds to one sample.

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
