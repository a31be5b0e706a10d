"""The engine deployment: one model and one decoding engine, whose steps all requests share."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ray import serve

import parallelmind as pm
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.scheduler import EngineConfig
from serving.config import AppConfig
from serving.engine.adapter_registry import AdapterRegistry, AdapterVersionGoneError
from serving.engine.load_model import load_model
from serving.engine.loop import EngineLoop, RunningRequest
from serving.engine.messages import (
    EngineRequest,
    PackedStep,
    RejectedRequest,
    StepOutput,
    pack_step,
)
from serving.observability.log import configure_log
from serving.observability.metrics import EngineMetrics, MetricFamily
from serving.runtime.ray_private import bind_replica_port_to_node_address


@dataclass(slots=True)
class _AdmittedRequest:
    """A request of this engine, and how much of the limits of one sample it uses.

    joins: the results of calls that add a branch, by the keys of their callers.
    """

    running: RunningRequest
    branches: int
    prompt_tokens: int
    joins: dict[str, asyncio.Future[int | RejectedRequest]]

    @classmethod
    def of(cls, running: RunningRequest, request: EngineRequest) -> _AdmittedRequest:
        """To be called in the event loop."""
        prompt_tokens = sum(sample.num_prompt_tokens for sample in request.samples)
        joins = {key: _completed(branch) for key, branch in request.joined.items()}
        return cls(running, request.num_branches, prompt_tokens, joins)

    def grow(self, branches: int, prompt_tokens: int) -> None:
        self.branches += branches
        self.prompt_tokens += prompt_tokens


def _completed(branch: int) -> asyncio.Future[int | RejectedRequest]:
    future: asyncio.Future[int | RejectedRequest] = asyncio.get_running_loop().create_future()
    future.set_result(branch)
    return future


class EngineReplica:
    """Decode requests. Closing the iterator of `generate`, or losing its reader, ends the request."""

    def __init__(self, config: AppConfig) -> None:
        import torch

        bind_replica_port_to_node_address()
        configure_log(config.log.log_level)
        torch.seed()  # torch starts with a fixed seed: unseeded requests would repeat after every restart
        model, tokenizer = load_model(config)
        engine_config = (
            EngineConfig(cache_tokens=config.replicas.cache_tokens) if config.replicas.cache_tokens else None
        )
        num_engines = (
            1 if config.replicas.num_gpus >= 1 else config.replicas.max_replicas
        )  # engines that share this memory
        self._engine = pm.Engine(model, tokenizer, engine_config, num_engines=num_engines)
        self._adapters = AdapterRegistry(self._engine, config)
        self._metrics = EngineMetrics(self._adapters.num_loaded)
        num_threads = config.replicas.num_threads or max(
            1, (os.cpu_count() or 1) // config.replicas.max_replicas
        )
        torch.set_num_threads(num_threads)  # compiled code keeps the number
        if config.replicas.compile:
            self._engine.warm_up(always=config.replicas.compile is True)
        self._loop = EngineLoop(
            self._engine, self._metrics.observe_step, config.replicas.stuck_s, num_threads
        )
        self._config, self._admitted = config, dict[str, _AdmittedRequest]()
        self._refreshing: asyncio.Task[None] | None = None
        self._name = serve.get_replica_context().replica_id.unique_id

    async def generate(self, request: EngineRequest) -> AsyncIterator[PackedStep | RejectedRequest]:
        """Yield the steps of a request; the first one holds the starts of its branches.

        A request that is not served yields one RejectedRequest and nothing else.
        """
        if self._refreshing is None:  # a constructor runs outside of the event loop
            self._refreshing = asyncio.create_task(self._adapters.keep_fresh())
        try:
            async with self._adapters.use(request.model, request.adapter_version) as (adapter, version):
                running = await self._loop.submit(request, adapter)
        except pm.UserError as error:
            yield _rejection(error)
            return
        self._admitted[request.id] = _AdmittedRequest.of(running, request)
        try:
            yield pack_step(StepOutput([], running.started, version))
            while (step := await self._loop.next_output(running)) is not None:
                yield pack_step(step)
        finally:
            del self._admitted[request.id]
            self._loop.release(running)

    async def add_branch(
        self, sample: str, ids: list[int], params: SamplingParams, key: str
    ) -> int | RejectedRequest | None:
        """Add a branch to a running sample. Returns its index, or None if the sample is not here.

        key: chosen by the caller. Further calls with the same one add nothing and return the same.
        """
        admitted = self._admitted.get(sample)
        if admitted is None or len(admitted.running.numbers) > 1:
            return None
        if key not in admitted.joins:
            admitted.joins[key] = asyncio.create_task(self._add_branch(admitted, ids, params, key))
        return await asyncio.shield(admitted.joins[key])

    async def _add_branch(
        self, admitted: _AdmittedRequest, ids: list[int], params: SamplingParams, key: str
    ) -> int | RejectedRequest:
        try:
            self._require_room(admitted, len(ids))
            admitted.grow(1, len(ids))  # before others that join meanwhile
            try:
                return await self._loop.join(admitted.running, ids, params, key)
            except pm.UserError:
                admitted.grow(-1, -len(ids))
                raise
        except pm.UserError as error:
            return _rejection(error)

    def _require_room(self, admitted: _AdmittedRequest, new_tokens: int) -> None:
        """Raise UserError if the sample would exceed the limits of a new sample."""
        max_branches, max_tokens = self._config.limits.max_branches, self._config.limits.max_prompt_tokens
        if admitted.branches >= max_branches:
            raise pm.UserError(
                f"text: branch {admitted.branches + 1} of its sample, {max_branches} allowed; "
                "begin another sample"
            )
        prompt_tokens = admitted.prompt_tokens + new_tokens
        if prompt_tokens > max_tokens:
            raise pm.UserError(
                f"text: {prompt_tokens} prompt tokens with the rest of its sample, {max_tokens} allowed; "
                "shorten it or begin another sample"
            )

    async def cancel(self, sample: str, branch: int | None) -> bool | None:
        """End a request or one of its branches. Returns None if the request is not here."""
        admitted = self._admitted.get(sample)
        if admitted is None:
            return None
        await self._loop.cancel(admitted.running, branch)
        return True

    async def ping(self) -> None:
        """Raise EngineStuckError if the engine does not compute."""
        self._loop.check_health()

    def __del__(self) -> None:
        """Serve calls this after the last request has ended."""
        self._loop.stop()

    async def check_health(self) -> None:
        """Serve calls this periodically and replaces a replica that raises or does not answer."""
        self._loop.check_health()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The metrics of `BranchLoadPolicy`; Serve calls this periodically."""
        stats = await self._loop.stats()
        return {"live_branches": stats.live_branches, "waiting_branches": stats.waiting_branches}

    async def metrics(self) -> tuple[str, list[MetricFamily]]:
        """The name of this process and its metrics."""
        return self._name, self._metrics.families_of(await self._loop.stats())


def _rejection(error: pm.UserError) -> RejectedRequest:
    return RejectedRequest(str(error), 503 if isinstance(error, AdapterVersionGoneError) else 400)
