"""Follow a request from engine to engine: if one is lost, another resumes its samples where they stopped."""

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
from parallelmind.engine.request import ResumeState
from serving.engine.messages import (
    BranchStarted,
    EngineRequest,
    PackedStep,
    RejectedRequest,
    StepOutput,
    unpack_step,
)
from serving.observability.log import log
from serving.observability.metrics import IngressMetrics
from serving.protocol.errors import EngineLostError, rejection_error

# Exceptions that a caller gets if an engine dies or fails.
_ENGINE_ERRORS = (RayError, RayServeException, grpc.RpcError, RuntimeError)
MAX_ATTEMPTS = 6  # without a new token: after that the sample itself may be the cause
_RETRY_PAUSE_S = 0.25
# An engine sends something every second. Serve takes longer to notice a frozen one.
SILENCE_TIMEOUT_S = 6.0
# Before its first message an engine may still be starting.
FIRST_MESSAGE_TIMEOUT_S = 20.0


class RequestReplay:
    """What a request has received so far: enough for another engine to resume its samples."""

    def __init__(self, request: EngineRequest) -> None:
        self._request, self._samples = request, request.samples
        self._num_prompt = list(map(len, request.prompts))
        num_branches = request.num_branches
        self._announced, self._joined = set[int](), dict[str, int]()
        self._start_times: list[int | None] = [None] * num_branches
        self._tokens: list[list[int]] = [[] for _ in range(num_branches)]
        self._finish_reasons: list[FinishReason | None] = [None] * num_branches
        self._adapter_version: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every branch has finished, the reduce branch included."""
        return all(self._finish_reasons)

    def record(self, step: StepOutput) -> StepOutput:
        """Record a step. Returns it without the branch starts that an earlier engine announced."""
        if self._adapter_version is None:
            self._adapter_version = step.adapter_version
        new_branches = [started for started in step.started if started.branch not in self._announced]
        for started in new_branches:
            self._announced.add(started.branch)
            if started.key is not None:
                self._joined[started.key] = started.branch
            if started.branch == len(self._tokens):
                self._add_branch(started)
            self._start_times[started.branch] = started.pos2d[1]
        for event in step.events:
            if event.pos2d and self._start_times[event.branch] is None:  # no start of a reduce is announced
                self._start_times[event.branch] = event.pos2d[1] - self._num_prompt[event.branch]
            if event.token is not None:
                self._tokens[event.branch].append(event.token)
            self._finish_reasons[event.branch] = event.finish_reason
        return StepOutput(step.events, new_branches)

    def _add_branch(self, joined: BranchStarted) -> None:
        (sample,) = self._samples  # a branch is added to a request of one sample
        self._samples = [sample.add_branch(joined.prompt, joined.params)]
        self._num_prompt.append(len(joined.prompt))
        self._start_times.append(None)
        self._tokens.append([])
        self._finish_reasons.append(None)

    def remaining_request(self) -> EngineRequest:
        """The request for the next engine."""
        if not self._announced:
            return self._request
        resume = ResumeState(self._start_times, self._tokens, self._finish_reasons)
        return replace(
            self._request,
            samples=self._samples,
            resume=resume,
            adapter_version=self._adapter_version,
            joined=self._joined,
        )


async def stream_with_failover(
    engine: DeploymentHandle, request: EngineRequest, metrics: IngressMetrics
) -> AsyncGenerator[StepOutput, None]:
    """All steps of a request, whichever engines decode it.

    Closing the iterator ends the request. Raises RequestError for a rejected request, and EngineLostError if
    no engine can finish it.
    """
    replay, attempts = RequestReplay(request), 0
    while attempts < MAX_ATTEMPTS:
        attempts += 1
        stream: Any = engine.generate.remote(replay.remaining_request())
        try:
            async for message in _messages(stream):
                if isinstance(message, RejectedRequest):
                    raise rejection_error(message)
                if any(message):
                    step = unpack_step(message)
                    if step.events:  # a start alone is no progress: a sample that crashes engines starts too
                        attempts = 0
                    yield replay.record(step)
            if replay.is_complete:
                return
            failure = "closed the stream before the sample finished"
        except _ENGINE_ERRORS as error:
            failure = f"failed ({type(error).__name__})"
            attempts -= isinstance(error, _EngineNotStartedError)
        finally:
            stream.cancel()
        if replay.is_complete:
            return
        log.warning("engine of %s %s; retrying (%d/%d)", request.id, failure, attempts, MAX_ATTEMPTS)
        metrics.moved_samples.inc()
        await asyncio.sleep(_RETRY_PAUSE_S * attempts)
    metrics.lost_samples.inc()
    raise EngineLostError


class _SilentEngineError(RuntimeError):
    """An engine has not sent anything for too long."""


class _EngineNotStartedError(_SilentEngineError):
    """An engine has not sent its first message; it may be starting.

    Not counted as an attempt: the timeout of the request bounds how often it happens.
    """


async def _messages(stream: Any) -> AsyncGenerator[PackedStep | RejectedRequest, None]:
    """All messages of an engine. Raises _SilentEngineError if the next one takes too long."""
    messages, received = aiter(stream), False
    while True:
        try:
            async with asyncio.timeout(SILENCE_TIMEOUT_S if received else FIRST_MESSAGE_TIMEOUT_S):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise (_SilentEngineError if received else _EngineNotStartedError) from None
        received = True
        yield message


async def with_deadline(
    timeout_s: float, steps: AsyncGenerator[StepOutput, None]
) -> AsyncGenerator[StepOutput, None]:
    """The steps. Raises TimeoutError if they have not ended after `timeout_s` seconds."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    async with aclosing(steps):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    step = await anext(steps)
            except StopAsyncIteration:
                return
            yield step
