"""The engine deployment: one model and one decoding engine, whose steps all requests share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import ray
from ray import serve

import parallelmind as pm
from parallelmind.engine.request import AddedSegments
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.tokenization import tokenize_branches
from parallelmind.hardware import decided_dtype, usable_threads
from parallelmind.tree import MAIN
from serving.config import AppConfig
from serving.engine.adapter_registry import AdapterRegistry, AdapterVersionGoneError
from serving.engine.admitted_request import Addition, AdmittedRequest
from serving.engine.kept_streams import KeptStreams
from serving.engine.load_model import load_model, on_gpu
from serving.engine.loop import EngineLoop
from serving.engine.messages import (
    EngineRequest,
    PackedStep,
    RejectedRequest,
    StepOutput,
    StepsAt,
    StreamHistory,
    StreamKey,
    pack_step,
)
from serving.engine.step_sender import BY_SERVE, StepSender
from serving.observability.log import configure_log
from serving.observability.metrics import EngineMetrics, MetricFamily
from serving.runtime.ray_private import bind_replica_port_to_node_address, node_address


class EngineReplica:
    """Decode requests. Closing the iterator of `generate`, or losing its reader, ends the request."""

    def __init__(self, config: AppConfig) -> None:
        import torch

        bind_replica_port_to_node_address()
        configure_log(config.log.log_level)
        torch.seed()  # torch starts with a fixed seed: unseeded requests would repeat after every restart
        if config.model.dtype == "auto":
            config = config.replace(dtype=decided_dtype("auto") if on_gpu(config) else "float32")
        num_threads = config.replicas.num_threads or usable_threads(_reserved_cpus())
        # A thread takes its OpenMP threads with it when it ends. They wait actively for their next operation,
        # and a step is half as long, only while there are no more of them than CPUs in this process.
        with ThreadPoolExecutor(1, "load") as thread:
            self._engine = thread.submit(_load_engine, config, num_threads).result()
        self._adapters = AdapterRegistry(self._engine, config)
        self._grammar_thread = ThreadPoolExecutor(1, "grammars")
        self._metrics = EngineMetrics(self._adapters.num_loaded)
        self._loop = EngineLoop(
            self._engine, self._metrics.observe_step, config.replicas.stuck_s, num_threads
        )
        self._sender = StepSender(node_address())
        self._config, self._admitted = config, dict[str, AdmittedRequest]()
        self._kept = KeptStreams()
        self._refreshing: asyncio.Task[None] | None = None
        self._name = serve.get_replica_context().replica_id.unique_id

    async def generate(
        self, request: EngineRequest, key: StreamKey | None = None
    ) -> AsyncIterator[PackedStep | StepsAt | RejectedRequest]:
        """Yield the steps of a request; the first one holds the starts of its branches.

        A request that is not served yields one RejectedRequest and nothing else.
        key: of the stream that takes the steps in place of the caller, who gets one StepsAt, and the steps
        for which the stream holds BY_SERVE.
        """
        if self._refreshing is None:  # a constructor runs outside of the event loop
            self._refreshing = asyncio.create_task(self._adapters.keep_fresh())
        try:
            await self._compile_grammars([params for sample in request.samples for params in sample.params])
            async with self._adapters.use(request.model, request.adapter_version) as (adapter, version):
                running = await self._loop.submit(request, adapter)
        except pm.UserError as error:
            yield _rejection(error)
            return
        admitted = self._admitted[request.id] = AdmittedRequest.of(running, request)
        step: StepOutput | None = StepOutput([], running.started, adapter_version=version)
        try:
            if key is not None:
                yield await self._sender.address()
            stream = nullcontext() if key is None else self._sender.stream(key)
            with self._kept.keep(request) as keep, stream as send:
                while step is not None:
                    packed = pack_step(step)
                    keep(packed)
                    if send is not None:
                        send(BY_SERVE if step.added else packed)
                    if send is None or step.added:
                        yield packed
                    step = await self._loop.next_output(running)
        finally:
            if self._admitted.get(request.id) is admitted:  # and not one that resumes its stream
                del self._admitted[request.id]
            self._loop.release(running)

    async def end_stream(self, id: str) -> StreamHistory | None:
        """End a stream, if it has not ended yet, so that another request resumes it.

        Returns its history; None if it is not kept here.
        """
        history = self._kept.end(id)
        if history is not None and id in self._admitted:
            await self._loop.cancel(self._admitted[id].running)
        return history

    async def join(self, sample: str, segment: pm.Segment, branch: int | None, key: str) -> Addition | None:
        """Add a branch below a segment of a running sample.

        Like `fork` and `reduce` it returns the index and the path of what it adds, and None if the sample is
        not here.
        branch: index of the segment that is continued; None for main.
        key: chosen by the caller. Further calls with the same one add nothing and return the same.
        """

        def join(number: int) -> list[int]:
            return [self._engine.join(number, segment, branch)]

        return await self._add_once(sample, [segment], branch, join, key)

    async def fork(self, sample: str, segments: list[pm.Segment], branch: int, key: str) -> Addition | None:
        """Stop a branch of a running sample and continue it with these."""

        def fork(number: int) -> list[int]:
            return self._engine.fork(number, branch, segments)

        return await self._add_once(sample, segments, branch, fork, key)

    async def reduce(self, sample: str, segment: pm.Segment, branch: int | None, key: str) -> Addition | None:
        """Give a segment of a running sample a reduce."""

        def reduce(number: int) -> list[int]:
            return [self._engine.reduce(number, branch, segment)]

        return await self._add_once(sample, [segment], branch, reduce, key, as_reduce=True)

    async def _add_once(
        self,
        sample: str,
        segments: list[pm.Segment],
        branch: int | None,
        add: Callable[[int], list[int]],
        key: str,
        as_reduce: bool = False,
    ) -> Addition | None:
        """Add segments, unless a call with this key did. add: as that of `EngineLoop.add`."""
        admitted = self._admitted.get(sample)
        if admitted is None or not admitted.can_grow:
            return None
        if key not in admitted.additions:
            parent = MAIN if branch is None else branch + 1
            added = AddedSegments(
                tokenize_branches(self._engine.tokenizer, segments, {}), parent, as_reduce, key
            )
            admitted.additions[key] = asyncio.create_task(self._add(admitted, add, added))
        return await asyncio.shield(admitted.additions[key])

    async def _add(
        self, admitted: AdmittedRequest, add: Callable[[int], list[int]], added: AddedSegments
    ) -> Addition:
        async with admitted.lock:
            try:
                await self._compile_grammars(added.request.params)
                admitted.require_room(added.request, self._config.limits)
                indices = await self._loop.add(admitted.running, add, added)
            except pm.UserError as error:
                return _rejection(error)
            return admitted.places(indices)

    async def _compile_grammars(self, params: Sequence[SamplingParams]) -> None:
        """Compile grammars, one after the other and beside the steps. Raises UserError as the engine does."""
        if any(branch.grammar is not None for branch in params):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._grammar_thread, self._engine.compile_grammars, params)

    async def cancel(self, sample: str, branch: int | None) -> bool | None:
        """End a request, or a branch and all below it. Returns None if the request is not here."""
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


def _load_engine(config: AppConfig, num_threads: int) -> pm.Engine:
    """An engine, compiled if it is to be. Raises UserError for what cannot be loaded."""
    import torch

    torch.set_num_threads(num_threads)  # of this thread; compiled code keeps the number
    model, tokenizer = load_model(config)
    replicas = config.replicas
    engine_config = EngineConfig(cache_tokens=replicas.cache_tokens) if replicas.cache_tokens else None
    # Engines that share this memory.
    num_engines = 1 if on_gpu(config, at_least=1) else replicas.max_replicas
    engine = pm.Engine(
        model,
        tokenizer,
        engine_config,
        num_engines=num_engines,
        document_cache=replicas.document_cache,
        document_cache_bytes=replicas.document_cache_bytes,
    )
    if replicas.compile:
        engine.warm_up(always=replicas.compile is True)
    return engine


def _reserved_cpus() -> float:
    """CPUs that Ray has reserved for this process."""
    return ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)


def _rejection(error: pm.UserError) -> RejectedRequest:
    return RejectedRequest(str(error), 503 if isinstance(error, AdapterVersionGoneError) else 400)
