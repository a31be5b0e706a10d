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

from parallelmind.engine.output import Event, FinishReason
from parallelmind.engine.request import AddedSegments, ResumeState
from parallelmind.tree import MAIN
from serving.engine.messages import (
    EngineRequest,
    PackedStep,
    RejectedRequest,
    StepOutput,
    StepsAt,
    StreamHistory,
    num_items,
    pack_step,
    unpack_step,
)
from serving.ingress.step_receiver import (
    SILENCE_TIMEOUT_S,
    ConnectionLostError,
    SilentEngineError,
    StepReceiver,
    StepStream,
)
from serving.observability.log import log
from serving.observability.metrics import IngressMetrics
from serving.protocol.errors import EngineLostError, engine_killed_error, rejection_error

# Exceptions that a caller gets if an engine dies or fails.
_ENGINE_ERRORS = (RayError, RayServeException, grpc.RpcError, RuntimeError)
MAX_ATTEMPTS = 6  # without a new token
MAX_KILLS = 2  # engines that were lost while they decoded a request, without a new token: it may be the cause
MAX_HISTORY_ITEMS = 20_000  # of a stream that its client can come back to
_RETRY_PAUSE_S = 0.25
# Before its first message an engine may still be starting.
FIRST_MESSAGE_TIMEOUT_S = 20.0


class RequestReplay:
    """What a request has received so far: enough for another engine to resume its samples."""

    def __init__(self, request: EngineRequest) -> None:
        self._request, self._samples = request, request.samples
        self._history: list[PackedStep] | None = None if request.history is None else []
        self._num_items = 0
        self._num_prompt = list(map(len, request.prompts))
        num_branches = request.num_branches
        self._added: dict[str, list[int]] = {}
        self._start_times: list[int | None] = [None] * num_branches
        self._tokens: list[list[int]] = [[] for _ in range(num_branches)]
        self._finish_reasons: list[FinishReason | None] = [None] * num_branches
        self._adapter_version: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether every segment has finished."""
        return all(self._finish_reasons)

    def record(self, packed: PackedStep) -> StepOutput:
        """Record a step. Returns it without the starts that an earlier engine announced."""
        step = unpack_step(packed)
        if self._history is not None:
            self._history.append(packed)
            self._num_items += num_items(packed)
            if self._num_items > MAX_HISTORY_ITEMS:
                self._history = None
        if self._adapter_version is None:
            self._adapter_version = step.adapter_version
        for added in step.added:
            self._add(added)
        new = [started for started in step.started if self._start_times[started.branch] is None]
        for started in new:
            self._start_times[started.branch] = started.pos2d[1]
        for event in step.events:
            self._record_event(event)
        return StepOutput(step.events, new, step.added)

    def _add(self, added: AddedSegments) -> None:
        (sample,) = self._samples  # segments are added to a request of one sample
        tree, first = added.request.tokens.tree, sample.num_branches
        if added.key is not None:
            self._added[added.key] = [
                first + number - 1 for number, parent, _ in tree.walk() if parent == MAIN
            ]
        self._samples = [added.extend(sample)]
        self._num_prompt += map(len, added.request.tokens.split()[1:])
        num_added = added.request.num_branches
        self._start_times += [None] * num_added
        self._tokens += [[] for _ in range(num_added)]
        self._finish_reasons += [None] * num_added

    def _record_event(self, event: Event) -> None:
        index = event.branch
        if self._start_times[index] is None:  # of a segment whose start was not announced
            start = event.start_pos2d(self._num_prompt[index])
            self._start_times[index] = start and start[1]
        if event.token is not None:
            self._tokens[index].append(event.token)
        self._finish_reasons[index] = event.finish_reason

    def remaining_request(self) -> EngineRequest:
        """The request for the next engine."""
        if self._adapter_version is None:  # no engine has sent anything
            return self._request
        resume = ResumeState(self._start_times, self._tokens, self._finish_reasons)
        begun = replace(self._request, history=None)
        return replace(
            self._request,
            samples=self._samples,
            resume=resume,
            adapter_version=self._adapter_version,
            added=self._added,
            history=None if self._history is None else StreamHistory(begun, tuple(self._history)),
        )


async def stream_with_failover(
    engine: DeploymentHandle, request: EngineRequest, metrics: IngressMetrics, receiver: StepReceiver
) -> AsyncGenerator[StepOutput, None]:
    """All steps of a request, whichever engines decode it.

    Those of its history come first. Closing the iterator ends the request. Raises RequestError for a rejected
    request and for one that may be what has killed its engines, and EngineLostError if no engine can finish
    it.
    """
    replay, attempts, kills = RequestReplay(request), 0, 0
    for packed in request.history.steps if request.history else ():
        yield replay.record(packed)
    while not replay.is_complete and attempts < MAX_ATTEMPTS and kills < MAX_KILLS:
        attempts += 1
        has_begun, failure = False, "closed the stream before the sample finished"
        try:
            async with aclosing(_messages(engine, replay.remaining_request(), receiver)) as messages:
                async for message in messages:
                    has_begun = True
                    if isinstance(message, RejectedRequest):
                        raise rejection_error(message)
                    if any(message):
                        if message[0]:  # a start is no progress: a sample that crashes engines starts too
                            attempts = kills = 0
                        yield replay.record(message)
        except _EngineNotStartedError:
            attempts -= 1
            log.warning("no engine has taken %s yet; asking again", request.id)
            continue
        except _ENGINE_ERRORS as error:
            failure = f"failed ({type(error).__name__})"
            kills += has_begun and not isinstance(error, SilentEngineError)
        if not replay.is_complete:
            log.warning("engine of %s %s; retrying (%d/%d)", request.id, failure, attempts, MAX_ATTEMPTS)
            metrics.moved_samples.inc()
            await asyncio.sleep(_RETRY_PAUSE_S * attempts)
    if not replay.is_complete:
        metrics.lost_samples.inc()
        raise engine_killed_error() if kills == MAX_KILLS else EngineLostError


class _EngineNotStartedError(SilentEngineError):
    """An engine has not sent its first message; it may be starting.

    Not counted as an attempt: the timeout of the request bounds how often it happens.
    """


async def _messages(
    engine: DeploymentHandle, request: EngineRequest, receiver: StepReceiver
) -> AsyncGenerator[PackedStep | RejectedRequest, None]:
    """All messages of an engine, whether Serve brings them or the receiver.

    Raises SilentEngineError if the next one takes too long.
    """
    with receiver.stream() as steps:
        stream: Any = engine.generate.remote(request, steps.key)
        watch: asyncio.Task[None] | None = None
        try:
            async for message in _messages_of_serve(stream):
                if isinstance(message, StepsAt):
                    yield pack_step(StepOutput([]))  # a sign of life
                    receiver.connect(steps, message)
                    watch = asyncio.create_task(_watch(stream, steps))
                    async for step in steps.steps():
                        yield step
                    return
                yield message
        finally:
            if watch is not None:
                watch.cancel()
            stream.cancel()


async def _watch(stream: Any, steps: StepStream) -> None:
    """Add the steps that Serve brings, and its failure. Serve's stream ends after that of the engine."""
    try:
        async for message in stream:
            steps.put_by_serve(message)
    except Exception as error:
        steps.put_by_serve(error)
    else:
        await asyncio.sleep(SILENCE_TIMEOUT_S)
        steps.put(ConnectionLostError("the end of the stream has not come"))


async def _messages_of_serve(stream: Any) -> AsyncGenerator[PackedStep | StepsAt | RejectedRequest, None]:
    messages, received = aiter(stream), False
    while True:
        try:
            async with asyncio.timeout(SILENCE_TIMEOUT_S if received else FIRST_MESSAGE_TIMEOUT_S):
                message = await anext(messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise (SilentEngineError if received else _EngineNotStartedError) from None
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
