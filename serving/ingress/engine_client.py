"""Client of the engines: start samples, change running ones, query all engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import perf_counter
from typing import Any, Literal

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

import parallelmind as pm
from serving.config import AppConfig
from serving.engine.messages import EngineRequest, RejectedRequest, StepOutput, StreamHistory
from serving.ingress.failover import stream_with_failover, with_deadline
from serving.ingress.step_receiver import StepReceiver
from serving.ingress.streaming import KEEP_ALIVE_S
from serving.observability.metrics import IngressMetrics, MetricFamily, ModelMetrics, engine_up
from serving.protocol.branches import SegmentPlace
from serving.protocol.branches_response import BranchTracker
from serving.protocol.errors import ErrorInfo, RequestError, rejection_error
from serving.runtime.ray_private import broadcast

_CONTROL_TIMEOUT_S = 3.0  # for the answer of one replica to a call that does not decode


class EngineClient:
    """All engine replicas behind one handle."""

    def __init__(
        self,
        engine: DeploymentHandle,
        config: AppConfig,
        metrics: IngressMetrics,
        fronts: DeploymentHandle | None = None,
    ) -> None:
        """fronts: all ingress processes, if there are several."""
        self._fronts = fronts
        self._engine, self._streams = engine, engine.options(stream=True)
        self._config, self._metrics, self._receiver = config, metrics, StepReceiver()

    async def start(self, request: EngineRequest) -> AsyncGenerator[StepOutput, None]:
        """Wait for the first step of a request; return all of its steps.

        Raises RequestError if the request is rejected: the response has not begun, so the error sets its
        status. A stream is not waited for until its client gives up: it begins, and a later error is raised
        by its steps.
        """
        steps = stream_with_failover(self._streams, request, self._metrics, self._receiver)
        measured = self._measure(request, with_deadline(self._config.limits.timeout_s, steps))
        first = asyncio.ensure_future(anext(measured))
        try:
            await asyncio.wait([first], timeout=None if request.history is None else KEEP_ALIVE_S)
        except asyncio.CancelledError:  # the client has left
            first.cancel()
            await asyncio.wait([first])
            raise
        if first.done():
            first.result()
        return _prepend(first, measured)

    async def _measure(
        self, request: EngineRequest, steps: AsyncGenerator[StepOutput, None]
    ) -> AsyncGenerator[StepOutput, None]:
        """The steps, with their tokens and times in the metrics.

        The first step shows that the model exists: only then is its name used as a label. Steps of the
        history have been measured before.
        """
        num_past = len(request.history.steps) if request.history else 0
        started_at, last_token_at = perf_counter(), dict[int, float]()
        tracker, prompt_tokens = BranchTracker(request), 0
        metrics: ModelMetrics | None = None
        async for step in steps:
            now = perf_counter()
            metrics = metrics or self._metrics.of_model(request.model)
            tracker.new_branches(step)
            if num_past:
                num_past, prompt_tokens = num_past - 1, tracker.prompt_tokens
                yield step
                continue
            if tracker.prompt_tokens != prompt_tokens:
                metrics.prompt_tokens.inc(tracker.prompt_tokens - prompt_tokens)
                prompt_tokens = tracker.prompt_tokens
            if step.events and not last_token_at:
                metrics.time_to_first_token.observe(now - started_at)
            for event in step.events:
                if event.branch in last_token_at:
                    metrics.time_per_token.observe(now - last_token_at[event.branch])
                last_token_at[event.branch] = now
            if completion_tokens := sum(event.token is not None for event in step.events):
                metrics.completion_tokens.inc(completion_tokens)
            yield step

    async def add(
        self,
        how: Literal["join", "fork", "reduce"],
        sample: str,
        segments: pm.Segment | list[pm.Segment],
        branch: int | None,
        key: str,
    ) -> list[SegmentPlace]:
        """Add segments to a running sample and return where they stand.

        how: the engine's method. branch: index of the segment that they continue; None for main.
        key: further calls with the same one add nothing and return the same. Raises RequestError if no engine
        that answers has the sample, or the segments are rejected.
        """
        result = await self._ask_owner(how, sample, segments, branch, key)
        if isinstance(result, RejectedRequest):
            raise rejection_error(result)
        return [SegmentPlace(index=index, path=path) for index, path in result]

    async def cancel(self, sample: str, branch: int | None) -> None:
        """End a sample, or a branch and all below it. Raises RequestError as `add` does."""
        await self._ask_owner("cancel", sample, branch)

    async def end_stream(self, id: str) -> StreamHistory:
        """The history of a stream whose client has come back; the stream itself ends.

        Raises RequestError if it is not kept, or if an engine that may have it does not answer.
        """
        answers = [answer async for answer in self._answers(self._engine, "end_stream", id)]
        if any(isinstance(answer, Exception) for answer in answers):
            raise _not_answering(id)
        histories = [answer for answer in answers if answer is not None]
        if not histories:
            raise _sample_not_found(id)
        return max(histories, key=lambda history: history.length)  # a lost engine may have had it before

    async def is_healthy(self) -> bool:
        """Whether an engine computes; with min_replicas=0 also if there is none, since one can be started."""
        any_replica = False
        async with aclosing(self._answers(self._engine, "ping")) as answers:
            async for answer in answers:
                if not isinstance(answer, Exception):
                    return True
                any_replica = True
        return not any_replica and not self._config.replicas.min_replicas

    async def metric_families(self) -> dict[str, list[MetricFamily]]:
        """The metrics of every ingress process and every engine, by the name of the process.

        Of an engine that does not answer, only that is known.
        """
        families, num_silent = await self._front_families(), 0
        async for answer in self._answers(self._engine, "metrics"):
            if isinstance(answer, Exception):
                num_silent += 1
                families[f"silent-{num_silent}"] = [engine_up(False)]
            else:
                name, own = answer
                families[name] = [*own, engine_up(True)]
        return families

    async def _front_families(self) -> dict[str, list[MetricFamily]]:
        """The metrics of every ingress process that answers."""
        if self._fronts is None:
            return {"front": self._metrics.families()}
        answers = [answer async for answer in self._answers(self._fronts, "own_metrics")]
        return dict(answer for answer in answers if not isinstance(answer, Exception))

    async def _ask_owner(self, method: str, sample: str, *args: Any) -> Any:
        """The result of a method from the engine that has a sample, whether or not the others answer.

        Raises RequestError if none has it, or none that answers.
        """
        num_silent = 0
        async with aclosing(self._answers(self._engine, method, sample, *args)) as answers:
            async for answer in answers:
                if isinstance(answer, Exception):
                    num_silent += 1
                elif answer is not None:
                    return answer
        raise _not_answering(sample) if num_silent else _sample_not_found(sample)

    async def _answers(
        self, deployment: DeploymentHandle, method: str, *args: Any
    ) -> AsyncGenerator[Any, None]:
        """The result of a method from every replica of a deployment, as they come.

        For a replica that fails or does not answer in time it is the exception.
        """
        try:
            async with asyncio.timeout(_CONTROL_TIMEOUT_S):
                results = await broadcast(deployment, method, *args)
        except DeploymentUnavailableError:
            return
        except TimeoutError as error:  # Serve does not know the replicas yet
            yield error
            return
        tasks = [asyncio.ensure_future(asyncio.wait_for(result, _CONTROL_TIMEOUT_S)) for result in results]
        try:
            for task in asyncio.as_completed(tasks):
                try:
                    answer = await task
                except Exception as error:
                    answer = error
                yield answer
        finally:
            for pending in tasks:
                pending.cancel()


async def _prepend(
    first: asyncio.Future[StepOutput], rest: AsyncGenerator[StepOutput, None]
) -> AsyncGenerator[StepOutput, None]:
    try:
        yield await first
        async for step in rest:
            yield step
    finally:
        await rest.aclose()


def _not_answering(sample: str) -> RequestError:
    message = f"sample {sample[:80]!r}: an engine that may have it does not answer; send the request again"
    info = ErrorInfo(message=message, type="server_error", code="engine_silent")
    return RequestError(503, info, {"retry-after": "1"})


def _sample_not_found(sample: str) -> RequestError:
    message = f"sample {sample[:80]!r}: has ended or never existed; begin another one"
    return RequestError(404, ErrorInfo(message=message, code="sample_not_found"))
