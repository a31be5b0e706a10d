"""A sample as a process in front follows it, from engine to engine if need be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import grpc
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from parallelmind.engine.output import FinishReason
from parallelmind.engine.request import ResumeState, TokenizedRequest
from parallelmind.layout import MAIN, Tokens
from serving.engine.messages import (
    BranchStarted,
    EngineRequest,
    Packed,
    RejectedRequest,
    StepOutput,
    unpacked,
)
from serving.observability.log import log
from serving.observability.metrics import IngressMetrics
from serving.protocol.errors import EngineLostError, refused

# What the death, the loss or the failure of an engine looks like from here.
_LOST = (RayError, RayServeException, grpc.RpcError, RuntimeError)
_TRIES = 6  # without a token in between; then the sample itself may be what kills engines
_PAUSE_S = 0.25
_SILENT_S = 6.0  # an engine says something every second; Serve takes longer to find one that is frozen
_FIRST_S = 20.0  # before its first word one may still have to start


class RequestReplay:
    """What has been told of a sample: enough for another engine to go on with it."""

    def __init__(self, work: EngineRequest) -> None:
        self._work = work
        self.begun: list[BranchStarted] = []
        self._said: list[list[int]] = []
        self._ended: list[FinishReason | None] = []
        self._version: str | None = None

    @property
    def quiet(self) -> bool:
        """Nobody who has begun goes on; after a cancel the branch that reads all others need not have."""
        return bool(self._ended) and all(self._ended)

    @property
    def done(self) -> bool:
        return self.quiet and len(self._ended) == len(self.begun) + (self._work.asked.reduce is not None)

    def heard(self, step: StepOutput) -> StepOutput:
        """Take note of a step; returns what of it is new."""
        self._version = step.version if self._version is None else self._version
        new = step.begun[max(len(self.begun) - step.begun[0].branch, 0) :] if step.begun else []
        for begun in new:
            self.begun.append(begun)
            self._add()
        for event in step.events:
            if event.branch == len(self._said):  # the branch that reads all others
                self._add()
            self._said[event.branch] += [] if event.token is None else [event.token]
            self._ended[event.branch] = event.finish_reason
        return StepOutput(step.events, new)

    def _add(self) -> None:
        self._said.append([])
        self._ended.append(None)

    def rest(self) -> EngineRequest:
        """What is left to do."""
        if not self.begun:
            return self._work
        asked = self._work.asked
        tokens = Tokens.of(asked.tokens.split()[MAIN], [begun.prompt for begun in self.begun])
        asked = TokenizedRequest(tokens, [begun.params for begun in self.begun], asked.reduce)
        progress = ResumeState([begun.place[1] for begun in self.begun], self._said, self._ended)
        return replace(self._work, asked=asked, progress=progress, version=self._version)


async def follow(
    engine: DeploymentHandle, work: EngineRequest, meters: IngressMetrics
) -> AsyncGenerator[StepOutput, None]:
    """All steps of a sample. If its engine is lost another one goes on where it stopped.

    Closing the iterator ends the sample. Raises RequestError for a sample that is refused, EngineLost if no
    engine can end it.
    """
    tale, tries = RequestReplay(work), 0
    while tries < _TRIES:
        tries += 1
        source: Any = engine.decode.remote(tale.rest())
        try:
            async for step in _spoken(source):
                if isinstance(step, RejectedRequest):
                    raise refused(step)
                if any(step):
                    new = unpacked(step)
                    tries = (
                        0 if new.events else tries
                    )  # to have begun is no progress: what kills engines does so as well
                    yield tale.heard(new)
            if tale.quiet:
                return
            log.warning("sample %s was left by its engine midway", work.id)
        except _LOST as error:
            log.warning("sample %s has lost its engine (%s)", work.id, type(error).__name__)
            tries -= isinstance(error, _NotStarted)
        finally:
            source.cancel()
        if tale.done:
            return
        meters.moved.inc()
        await asyncio.sleep(_PAUSE_S * tries)
    meters.lost.inc()
    raise EngineLostError


class _Silent(RuntimeError):  # noqa: N818
    """An engine has not been heard of for too long."""


class _NotStarted(_Silent):
    """There was not a word from it yet: it may be starting. The request's own time limits how often that is
    tried.
    """


async def _spoken(source: Any) -> AsyncGenerator[Packed | RejectedRequest, None]:
    """All that an engine says, as long as it says something."""
    messages, heard = aiter(source), False
    while True:
        try:
            async with asyncio.timeout(_SILENT_S if heard else _FIRST_S):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise (_Silent if heard else _NotStarted) from None
        heard = True
        yield message


async def within(seconds: float, steps: AsyncGenerator[StepOutput, None]) -> AsyncGenerator[StepOutput, None]:
    """The steps, as long as they come in time. Raises TimeoutError."""
    end = asyncio.get_running_loop().time() + seconds
    async with aclosing(steps) as each:
        while True:
            try:
                async with asyncio.timeout_at(end):
                    step = await anext(each)
            except StopAsyncIteration:
                return
            yield step
