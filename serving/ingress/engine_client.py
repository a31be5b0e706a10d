"""Client of the engines: start samples, change running ones, query all engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from time import perf_counter
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from parallelmind.engine.sampling_params import SamplingParams
from serving.config import AppConfig
from serving.engine.messages import EngineRequest, RejectedRequest, StepOutput
from serving.ingress.failover import stream_with_failover, with_deadline
from serving.observability.metrics import IngressMetrics, MetricFamily
from serving.protocol.branches_response import BranchTracker
from serving.protocol.errors import ErrorInfo, RequestError, rejection_error

_CONTROL_TIMEOUT_S = 5.0  # of calls that do not decode


class EngineClient:
    """All engine replicas behind one handle."""

    def __init__(self, engine: DeploymentHandle, config: AppConfig, metrics: IngressMetrics) -> None:
        self._engine, self._streams = engine, engine.options(stream=True)
        self._config, self._metrics = config, metrics

    async def start(self, request: EngineRequest) -> AsyncGenerator[StepOutput, None]:
        """Wait for the first step of a sample; return all of its steps.

        Raises RequestError if the request is rejected: the response has not begun, so the error sets its
        status.
        """
        steps = stream_with_failover(self._streams, request, self._metrics)
        measured = self._measure(request, with_deadline(self._config.limits.timeout_s, steps))
        first = await anext(measured)
        return _prepend(first, measured)

    async def _measure(
        self, request: EngineRequest, steps: AsyncGenerator[StepOutput, None]
    ) -> AsyncGenerator[StepOutput, None]:
        """The steps, with their tokens and times in the metrics.

        The first step shows that the model exists: only then is its name used as a label.
        """
        started_at, last_token_at = perf_counter(), dict[int, float]()
        tracker, prompt_tokens = BranchTracker(request), 0
        metrics, model = self._metrics, request.model
        async for step in steps:
            now = perf_counter()
            tracker.new_branches(step)
            metrics.tokens.labels(model, "prompt").inc(tracker.prompt_tokens - prompt_tokens)
            prompt_tokens = tracker.prompt_tokens
            if step.events and not last_token_at:
                metrics.time_to_first_token.labels(model).observe(now - started_at)
            for event in step.events:
                if event.branch in last_token_at:
                    metrics.time_per_token.labels(model).observe(now - last_token_at[event.branch])
                last_token_at[event.branch] = now
                metrics.tokens.labels(model, "completion").inc(event.token is not None)
            yield step

    async def add_branch(self, sample: str, ids: list[int], params: SamplingParams) -> int:
        """Add a branch to a running sample and return its index.

        Raises RequestError if no engine has the sample, or the branch is rejected.
        """
        for result in await self._ask_all("add_branch", sample, ids, params):
            if isinstance(result, RejectedRequest):
                raise rejection_error(result)
            if result is not None:
                return int(result)
        raise _sample_not_found(sample)

    async def cancel(self, sample: str, branch: int | None) -> None:
        """End a sample or one of its branches. Raises RequestError if no engine has the sample."""
        if not any(await self._ask_all("cancel", sample, branch)):
            raise _sample_not_found(sample)

    async def is_healthy(self) -> bool:
        """Whether an engine computes; with min_replicas=0 also if there is none, since one can be started."""
        if not self._config.replicas.min_replicas and not await self._ask_all("ping"):
            return True
        try:
            await asyncio.wait_for(self._engine.ping.remote(), _CONTROL_TIMEOUT_S)
        except Exception:  # any error means that the engine does not answer
            return False
        return True

    async def metric_families(self) -> dict[str, list[MetricFamily]]:
        """The metrics of this process and of every engine, by the name of the process."""
        return {"front": self._metrics.families(), **dict(await self._ask_all("metrics"))}

    async def _ask_all(self, method: str, *args: Any) -> list[Any]:
        """Results of a method from all replicas that responded."""
        try:
            responses = self._engine.broadcast(method, *args)
            results = await responses.results_async(timeout_s=_CONTROL_TIMEOUT_S, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        except TimeoutError:
            info = ErrorInfo(message="an engine does not respond; try again", type="server_error")
            raise RequestError(503, info) from None
        return [result for result in results if not isinstance(result, BaseException)]


async def _prepend(
    first: StepOutput, rest: AsyncGenerator[StepOutput, None]
) -> AsyncGenerator[StepOutput, None]:
    try:
        yield first
        async for step in rest:
            yield step
    finally:
        await rest.aclose()


def _sample_not_found(sample: str) -> RequestError:
    message = f"sample {sample[:80]!r}: has ended or never existed; begin another one"
    return RequestError(404, ErrorInfo(message=message, code="sample_not_found"))
