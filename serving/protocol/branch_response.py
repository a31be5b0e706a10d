"""Steps of an engine as an answer of /v1/branches, which tells tokens and coordinates beside the text."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import parallelmind as pm
from parallelmind.layout import MAIN
from serving.engine.messages import BranchStarted, EngineRequest, StepOutput
from serving.protocol.branches import (
    BranchesAnswer,
    BranchesStarted,
    BranchOutput,
    BranchStart,
    Delta,
    Deltas,
    Done,
)
from serving.protocol.openai import Usage


def _place(begun: BranchStarted) -> BranchStart:
    return BranchStart(
        index=begun.branch, prompt_tokens=len(begun.prompt), branch=begun.place[0], time=begun.place[1]
    )


def _delta(event: pm.Event) -> Delta:
    branch, time = event.pos2d or (None, None)
    return Delta(
        index=event.branch,
        text=event.text,
        token=event.token,
        branch=branch,
        time=time,
        finish_reason=event.finish_reason,
        logprob=event.logprob,
        top=list(event.top),
    )


class BranchTracker:
    """Knows which branches have begun. The one that reads all others says so by its first token.

    read: prompt tokens so far, main's among them.
    """

    def __init__(self, work: EngineRequest) -> None:
        self._work, self._known = work, 0
        self.read = int(work.asked.tokens.lengths[MAIN])

    def begun(self, step: StepOutput) -> list[BranchStart]:
        found = [_place(begun) for begun in step.begun]
        self._known += len(found)
        last = self._work.asked.reduce
        for event in step.events:
            if event.branch >= self._known and last and event.pos2d:
                branch, time = event.pos2d
                found.append(
                    BranchStart(
                        index=event.branch,
                        prompt_tokens=len(last.token_ids),
                        branch=branch,
                        time=time - len(last.token_ids),
                    )
                )
                self._known += 1
        self.read += sum(place.prompt_tokens for place in found)
        return found

    def heard(self, step: StepOutput) -> list[pm.Event]:
        """What begun branches say; one that is cancelled before its first word says nothing."""
        return [event for event in step.events if event.branch < self._known]


async def parts(work: EngineRequest, steps: AsyncIterator[StepOutput]) -> AsyncIterator[dict[str, Any]]:
    """How the branches begin, what each step adds to them, and the usage."""
    follower, written = BranchTracker(work), 0
    kind: Literal["branches.begun", "branches.joined"] = "branches.begun"
    async for step in steps:
        if places := follower.begun(step):
            yield BranchesStarted(id=work.id, object=kind, model=work.model, branches=places).model_dump()
            kind = "branches.joined"
        if events := follower.heard(step):
            written += sum(event.token is not None for event in events)
            yield Deltas(id=work.id, deltas=[_delta(event) for event in events]).model_dump()
    yield Done(id=work.id, usage=Usage.of(follower.read, written)).model_dump()


async def whole(work: EngineRequest, steps: AsyncIterator[StepOutput]) -> dict[str, Any]:
    """Every branch, once all have ended."""
    follower, told = BranchTracker(work), dict[int, BranchOutput]()
    async for step in steps:
        for place in follower.begun(step):
            told[place.index] = BranchOutput(
                index=place.index,
                text="",
                tokens=[],
                finish_reason=None,
                branch=place.branch,
                time=place.time,
            )
        for event in follower.heard(step):
            _add(told[event.branch], event)
    branches = [told[index] for index in sorted(told)]
    usage = Usage.of(follower.read, sum(len(branch.tokens) for branch in branches))
    answer = BranchesAnswer(
        id=work.id, created=int(time.time()), model=work.model, branches=branches, usage=usage
    )
    return answer.model_dump()


def _add(told: BranchOutput, event: pm.Event) -> None:
    told.text += event.text
    told.finish_reason = event.finish_reason
    if event.token is not None:
        told.tokens.append(event.token)
    if event.logprob is not None:
        told.logprobs = [*(told.logprobs or []), event.logprob]
        told.top = [*(told.top or []), list(event.top)]
