"""Engine steps as the response of /v1/branches, with the text, tokens and coordinates."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import parallelmind as pm
from parallelmind.tree import MAIN
from serving.engine.messages import BranchStarted, EngineRequest, StepOutput
from serving.protocol.branches import (
    BranchesResponse,
    BranchesStarted,
    BranchOutput,
    BranchStart,
    Delta,
    Deltas,
    Done,
)
from serving.protocol.errors import decoding_error
from serving.protocol.openai import Usage


class BranchTracker:
    """The branches of a request that have started.

    The engine does not announce the reduce branch: it starts with its first token.
    prompt_tokens: as the client counts them; by default of main and of all started branches.
    """

    def __init__(self, request: EngineRequest) -> None:
        self._num_prompt = list(map(len, request.prompts))
        self._started = set[int]()
        self._is_counting = request.prompt_tokens is None
        num_main = sum(int(sample.tokens.lengths[MAIN]) for sample in request.samples)
        self.prompt_tokens = num_main if request.prompt_tokens is None else request.prompt_tokens

    def new_branches(self, step: StepOutput) -> list[BranchStart]:
        """The branches that start in this step."""
        starts = [_branch_start(started) for started in step.started]
        self._started.update(start.index for start in starts)
        for event in step.events:
            if event.branch not in self._started and event.pos2d:
                branch, time = event.pos2d
                length = self._num_prompt[event.branch]
                starts.append(
                    BranchStart(index=event.branch, prompt_tokens=length, branch=branch, time=time - length)
                )
                self._started.add(event.branch)
        if self._is_counting:
            self.prompt_tokens += sum(start.prompt_tokens for start in starts)
        return starts

    def events_of_started(self, step: StepOutput) -> list[pm.Event]:
        """The events, without those of a reduce branch that was cancelled before its first token."""
        return [event for event in step.events if event.branch in self._started]


def _branch_start(started: BranchStarted) -> BranchStart:
    branch, time = started.pos2d
    return BranchStart(index=started.branch, prompt_tokens=len(started.prompt), branch=branch, time=time)


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
        error=event.error,
    )


async def branches_chunks(
    request: EngineRequest, steps: AsyncIterator[StepOutput]
) -> AsyncIterator[dict[str, Any]]:
    """The started branches, the deltas of every step, and the usage."""
    tracker, completion_tokens = BranchTracker(request), 0
    kind: Literal["branches.begun", "branches.joined"] = "branches.begun"
    async for step in steps:
        if starts := tracker.new_branches(step):
            chunk = BranchesStarted(id=request.id, object=kind, model=request.model, branches=starts)
            yield chunk.model_dump()
            kind = "branches.joined"
        if events := tracker.events_of_started(step):
            completion_tokens += sum(event.token is not None for event in events)
            yield Deltas(id=request.id, deltas=[_delta(event) for event in events]).model_dump()
    usage = Usage.of(tracker.prompt_tokens, completion_tokens)
    yield Done(id=request.id, usage=usage).model_dump()


async def branches_response(request: EngineRequest, steps: AsyncIterator[StepOutput]) -> dict[str, Any]:
    """The response with every branch, once all have ended.

    Raises RequestError if every branch ended with an error.
    """
    tracker, outputs = BranchTracker(request), dict[int, BranchOutput]()
    async for step in steps:
        for start in tracker.new_branches(step):
            outputs[start.index] = BranchOutput(
                index=start.index,
                text="",
                tokens=[],
                finish_reason=None,
                branch=start.branch,
                time=start.time,
            )
        for event in tracker.events_of_started(step):
            _append(outputs[event.branch], event)
    branches = [outputs[index] for index in sorted(outputs)]
    if branches and branches[0].error is not None and all(branch.error is not None for branch in branches):
        raise decoding_error(f"branches[0]: {branches[0].error}")
    usage = Usage.of(tracker.prompt_tokens, sum(len(branch.tokens) for branch in branches))
    return BranchesResponse(
        id=request.id, created=int(time.time()), model=request.model, branches=branches, usage=usage
    ).model_dump()


def _append(output: BranchOutput, event: pm.Event) -> None:
    output.text += event.text
    output.finish_reason, output.error = event.finish_reason, event.error
    if event.token is not None:
        output.tokens.append(event.token)
    if event.logprob is not None:
        output.logprobs = [*(output.logprobs or []), event.logprob]
        output.top = [*(output.top or []), list(event.top)]
