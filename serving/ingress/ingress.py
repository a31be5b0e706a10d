"""The process in front: speaks HTTP in OpenAI's shapes and holds no model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from time import perf_counter
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

import parallelmind as pm
from serving.config import AppConfig
from serving.engine.messages import EngineRequest, RejectedRequest, StepOutput
from serving.ingress.failover import follow, within
from serving.ingress.preprocessor import RequestPreprocessor
from serving.ingress.request_limits import ApiKeys, RequestLimitsMiddleware
from serving.observability.log import log, set_up
from serving.observability.metrics import Family, IngressMetrics
from serving.protocol.branch_response import BranchTracker
from serving.protocol.errors import RequestError, refusal
from serving.protocol.openai import ErrorInfo
from serving.runtime.ports import keep_on_node_address

_CONTROL_S = 5.0  # for an engine to answer what is not decoding
_LONG = 20_000  # bytes of a body whose encoding would hold up everybody else

T = TypeVar("T")
BodyT = TypeVar("BodyT")


class Ingress:
    """What the routes need: the engines, the tokenizer, and the meters."""

    def __init__(self, engine: DeploymentHandle, config: AppConfig) -> None:
        keep_on_node_address()
        set_up(config.log_level)
        self.config = config
        self._engine, self._streams = engine, engine.options(stream=True)
        self.meters = IngressMetrics()
        self.asker = RequestPreprocessor(config, config.load_tokenizer(), config.context())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from serving.ingress.routes import routes

        gate = RequestLimitsMiddleware(
            routes(self), self.config, ApiKeys(self.config.api_keys()), self.meters
        )
        if not self.config.cors_origins:
            return gate
        # Around the gate: a browser asks without a key whether it may call, and must be able to read a
        # refusal.
        headers = ["authorization", "content-type"]
        return CORSMiddleware(
            gate, allow_origins=self.config.cors_origins, allow_methods=["*"], allow_headers=headers
        )

    async def work(self, encode: Callable[[BodyT], T], body: BodyT, size: int) -> T:
        """What a body asks for. Raises RequestError for what is not served."""
        if self.config.log_prompts:
            log.info("asks %r", body)
        try:
            return await asyncio.to_thread(encode, body) if size > _LONG else encode(body)
        except pm.UserError as error:
            raise refusal(str(error)) from error

    async def begin(self, work: EngineRequest) -> AsyncGenerator[StepOutput, None]:
        """The steps of a sample that has begun. Raises RequestError if it is refused: then no answer is out
        yet.
        """
        steps = self._timed(work, within(self.config.timeout_s, follow(self._streams, work, self.meters)))
        first = await anext(steps)
        return _resumed(first, steps)

    async def _timed(
        self, work: EngineRequest, steps: AsyncGenerator[StepOutput, None]
    ) -> AsyncGenerator[StepOutput, None]:
        began, last, follower, read = perf_counter(), dict[int, float](), BranchTracker(work), 0
        async for (
            step
        ) in steps:  # from the first on the model is known, and its name no invention of a client's
            now = perf_counter()
            follower.begun(step)
            self.meters.tokens.labels(work.model, "prompt").inc(follower.read - read)
            read = follower.read
            if step.events and not last:
                self.meters.first.labels(work.model).observe(now - began)
            for event in step.events:
                if event.branch in last:
                    self.meters.each.labels(work.model).observe(now - last[event.branch])
                last[event.branch] = now
                self.meters.tokens.labels(work.model, "completion").inc(event.token is not None)
            yield step

    async def join(self, sample: str, ids: list[int], params: Any) -> int:
        """Add a branch to a sample, wherever it is decoded; returns its number. Raises RequestError if there
        is none.
        """
        for found in await self._everywhere("join", sample, ids, params):
            if isinstance(found, RejectedRequest):
                raise refusal(*found)
            if found is not None:
                return int(found)
        raise _no_sample(sample)

    async def cancel(self, sample: str, branch: int | None) -> None:
        if not any(await self._everywhere("cancel", sample, branch)):
            raise _no_sample(sample)

    async def healthy(self) -> bool:
        """Whether an engine answers and computes; where there may be none, whether one could be asked for."""
        if not self.config.min_replicas and not await self._everywhere("alive"):
            return True
        try:
            await asyncio.wait_for(self._engine.alive.remote(), _CONTROL_S)
        except Exception:  # whatever it is: this engine is not well
            return False
        return True

    async def all_meters(self) -> dict[str, list[Family]]:
        """Of this process and of every engine."""
        engines = await self._everywhere("meters")
        return {"front": self.meters.families(), **dict(engines)}

    async def _everywhere(self, method: str, *args: Any) -> list[Any]:
        """What every engine answers that does."""
        from ray.serve.exceptions import DeploymentUnavailableError

        try:
            called = self._engine.broadcast(method, *args)
            found = await called.results_async(timeout_s=_CONTROL_S, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        except TimeoutError:
            raise RequestError(
                503, ErrorInfo(message="an engine does not answer; try again", type="server_error")
            ) from None
        return [each for each in found if not isinstance(each, BaseException)]


async def _resumed(
    first: StepOutput, rest: AsyncGenerator[StepOutput, None]
) -> AsyncGenerator[StepOutput, None]:
    try:
        yield first
        async for step in rest:
            yield step
    finally:
        await rest.aclose()


def _no_sample(sample: str) -> RequestError:
    message = f"sample {sample[:80]!r}: has ended or never was; begin another one"
    return RequestError(404, ErrorInfo(message=message, code="sample_not_found"))
