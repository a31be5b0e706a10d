"""What travels between the processes in front and the engines."""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NamedTuple

from parallelmind.engine.output import Event
from parallelmind.engine.request import ResumeState, TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams

_FIELDS = [field.name for field in fields(Event)]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A sample to decode. id: unique, by which it can be joined and cancelled.

    progress, version: how far a lost engine had come, and with which version of the model's adapter.
    """

    id: str
    model: str
    asked: TokenizedRequest
    progress: ResumeState | None = None
    version: str | None = None


class BranchStarted(NamedTuple):
    """A branch begins. place: the branch and time coordinates of its prompt's first token."""

    branch: int
    prompt: list[int]
    params: SamplingParams
    place: tuple[int, int]


class StepOutput(NamedTuple):
    """What one step of the engine adds to one sample.

    begun: branches that joined before it. version: which one of the adapter is at work; told with the first
    branches.
    """

    events: list[Event]
    begun: list[BranchStarted]
    version: str | None = None


Packed = tuple[list[tuple[Any, ...]], list[BranchStarted], str | None]


def packed(step: StepOutput) -> Packed:
    """A step as it travels: of plain tuples, which Serve's pickler writes ten times as fast as objects."""
    return [attrgetter(*_FIELDS)(event) for event in step.events], step.begun, step.version


def unpacked(step: Packed) -> StepOutput:
    events, begun, version = step
    return StepOutput([Event(*values) for values in events], begun, version)


class RejectedRequest(NamedTuple):
    """Why a sample is not decoded. A value and no exception: Serve would log each one's traceback as a
    failure.
    """

    message: str
    status: int = 400
