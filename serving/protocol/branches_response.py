"""Engine steps as the response of /v1/branches, with the text, tokens and coordinates."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import parallelmind as pm
from parallelmind.engine.fork_parser import Fork
from parallelmind.engine.request import TokenizedRequest
from parallelmind.tree import MAIN, Tree, segment_paths
from serving.engine.messages import EngineRequest, StepOutput
from serving.protocol.branches import (
    BranchCall,
    BranchesRequest,
    BranchesResponse,
    BranchesStarted,
    BranchOutput,
    BranchStart,
    Delta,
    Deltas,
    Done,
    SegmentPlace,
    TitledSegment,
    WrittenFork,
)
from serving.protocol.errors import decoding_error
from serving.protocol.openai import Usage
from serving.protocol.tool_calls import ToolCallParser
from serving.protocol.tools import CalledFunction


class BranchTracker:
    """The segments of a request that have started.

    Most segments start after others have ended. The engine does not announce them: their first event tells
    their start.

    samples: with all segments, also those that were added to the only sample.
    paths: of every segment, by index.
    prompt_tokens: as the client counts them; by default of main and of all started segments.
    """

    def __init__(self, request: EngineRequest) -> None:
        self._set_samples(request.samples)
        self._started = set[int]()
        self._is_counting = request.prompt_tokens is None
        num_main = sum(int(sample.tokens.lengths[MAIN]) for sample in request.samples)
        self.prompt_tokens = num_main if request.prompt_tokens is None else request.prompt_tokens

    def new_branches(self, step: StepOutput) -> list[BranchStart]:
        """The segments that start in this step."""
        for added in step.added:
            (sample,) = self.samples  # segments are added to a request of one sample
            self._set_samples([added.extend(sample)])
        starts = [self._start(started.branch, started.pos2d) for started in step.started]
        for event in step.events:
            if event.branch not in self._started and event.pos2d:
                start = event.start_pos2d(self._num_prompt[event.branch])
                assert start is not None, "an event with coordinates tells where its segment starts"
                starts.append(self._start(event.branch, start))
        return starts

    def _set_samples(self, samples: list[TokenizedRequest]) -> None:
        self.samples = samples
        self.paths = [path for sample in samples for path in segment_paths(sample.tokens.tree)[1:]]
        self._num_prompt = [length for sample in samples for length in sample.tokens.lengths.tolist()[1:]]

    def _start(self, index: int, pos2d: tuple[int, int]) -> BranchStart:
        self._started.add(index)
        prompt_tokens = self._num_prompt[index]
        self.prompt_tokens += prompt_tokens if self._is_counting else 0
        branch, time = pos2d
        return BranchStart(
            index=index, path=self.paths[index], prompt_tokens=prompt_tokens, branch=branch, time=time
        )


class BranchCalls:
    """Finds the calls of tools in the branches of a request that are messages."""

    def __init__(self, id: str, body: BranchesRequest) -> None:
        """id: of the request."""
        names = [tool.function.name for tool in body.shown_tools]
        self._name = id.partition("-")[2]
        self._parsers = {
            f"branches[{index}]": ToolCallParser(names, not body.parallel_tool_calls)
            for index, branch in enumerate(body.branches)
            if names and branch.messages
        }
        self._num_calls = Counter[str]()

    def add(self, path: str, event: pm.Event) -> list[BranchCall]:
        """The calls that are complete with this token of a segment."""
        if path not in self._parsers:
            return []
        parser = self._parsers[path]
        pieces = [parser.push(event.text), *([parser.flush()] if event.finish_reason else [])]
        return [self._call(path, event.branch, *call) for piece in pieces for call in piece.calls]

    def _call(self, path: str, index: int, name: str, arguments: str) -> BranchCall:
        number = self._num_calls[path]
        self._num_calls[path] += 1
        function = CalledFunction(name=name, arguments=arguments)
        return BranchCall(id=f"call_{self._name}_{index}_{number}", function=function)


def _delta(event: pm.Event, paths: Sequence[str], calls: list[BranchCall]) -> Delta:
    branch, time = event.pos2d if event.pos2d and event.token is not None else (None, None)
    return Delta(
        index=event.branch,
        path=paths[event.branch],
        text=event.text,
        token=event.token,
        branch=branch,
        time=time,
        finish_reason=event.finish_reason,
        logprob=event.logprob,
        top=list(event.top),
        error=event.error,
        tool_calls=calls,
        fork=None if event.fork is None else _written_fork(event.fork, paths),
    )


def _written_fork(fork: Fork, paths: Sequence[str]) -> WrittenFork:
    branches = [
        TitledSegment(index=index, path=paths[index], title=title)
        for index, title in zip(fork.branches, fork.titles, strict=True)
    ]
    return WrittenFork(branches=branches, reduce=SegmentPlace(index=fork.reduce, path=paths[fork.reduce]))


async def branches_chunks(
    request: EngineRequest, steps: AsyncIterator[StepOutput], calls: BranchCalls
) -> AsyncIterator[dict[str, Any]]:
    """The started segments, the deltas of every step, and the usage."""
    tracker, completion_tokens = BranchTracker(request), 0
    kind: Literal["branches.begun", "branches.joined"] = "branches.begun"
    async for step in steps:
        if starts := tracker.new_branches(step):
            chunk = BranchesStarted(id=request.id, object=kind, model=request.model, branches=starts)
            yield chunk.model_dump()
            kind = "branches.joined"
        if step.events:
            completion_tokens += sum(event.token is not None for event in step.events)
            paths = tracker.paths
            deltas = [_delta(event, paths, calls.add(paths[event.branch], event)) for event in step.events]
            yield Deltas(id=request.id, deltas=deltas).model_dump()
    usage = Usage.of(tracker.prompt_tokens, completion_tokens)
    yield Done(id=request.id, usage=usage).model_dump()


async def branches_response(
    request: EngineRequest, steps: AsyncIterator[StepOutput], calls: BranchCalls
) -> dict[str, Any]:
    """The response with the whole tree, once all segments have ended.

    Raises RequestError if every segment ended with an error.
    """
    tracker, outputs = BranchTracker(request), list[BranchOutput]()
    async for step in steps:
        starts = tracker.new_branches(step)
        for index in range(len(outputs), len(tracker.paths)):
            outputs.append(BranchOutput(index=index, path=tracker.paths[index]))
        for start in starts:
            outputs[start.index].branch, outputs[start.index].time = start.branch, start.time
        for event in step.events:
            output = outputs[event.branch]
            _append(output, event)
            output.tool_calls += calls.add(output.path, event)
            if event.fork is not None:
                for index, title in zip(event.fork.branches, event.fork.titles, strict=True):
                    outputs[index].title = title
    tree = tracker.samples[0].tokens.tree
    decoded = outputs[tree.documents :]
    if decoded and all(output.error is not None for output in decoded):
        raise decoding_error(f"{decoded[0].path}: {decoded[0].error}")
    main = _nested(outputs, tree)
    return BranchesResponse(
        id=request.id,
        created=int(time.time()),
        model=request.model,
        branches=main.branches,
        reduce=main.reduce,
        usage=Usage.of(tracker.prompt_tokens, sum(len(output.tokens) for output in outputs)),
    ).model_dump()


def _nested(outputs: Sequence[BranchOutput], tree: Tree) -> BranchOutput:
    """Put every output into that of the segment that it continues; returns one for main.

    Documents have no output.
    """
    main = BranchOutput(index=-1, path="")
    by_number = [main, *outputs]
    for number, parent, _ in tree.walk():
        if tree.is_reduce[number]:
            by_number[parent].reduce = by_number[number]
        elif number > tree.documents:
            by_number[parent].branches.append(by_number[number])
    return main


def _append(output: BranchOutput, event: pm.Event) -> None:
    output.text += event.text
    output.finish_reason, output.error = event.finish_reason, event.error
    if event.token is not None:
        output.tokens.append(event.token)
    if event.logprob is not None:
        output.logprobs = [*(output.logprobs or []), event.logprob]
        output.top = [*(output.top or []), list(event.top)]
