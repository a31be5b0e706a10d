"""The deployment that holds the model: one decoding engine, whose steps are shared by all requests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass

from ray import serve

import parallelmind as pm
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.errors import CapacityError
from serving.config import AppConfig
from serving.engine.adapter_registry import AdapterRegistry, AdapterVersionGone
from serving.engine.loop import EngineLoop
from serving.engine.messages import BranchStarted, EngineRequest, Packed, RejectedRequest, StepOutput, packed
from serving.observability.log import set_up
from serving.observability.metrics import EngineMetrics, Family
from serving.runtime.ports import keep_on_node_address


@dataclass(slots=True)
class _Held:
    """A sample that is decoded here: the engine's number of it, and how much of what one sample may have it
    has.
    """

    number: int
    branches: int
    prompt_tokens: int

    @classmethod
    def of(cls, number: int, work: EngineRequest) -> _Held:
        asked, last = work.asked, work.asked.reduce
        return cls(
            number,
            asked.tokens.branches + (last is not None),
            len(asked.tokens.ids) + (len(last.token_ids) if last else 0),
        )


class EngineReplica:
    """Decodes samples for whoever asks; closing an iterator, or the death of who reads it, ends its
    sample.
    """

    def __init__(self, config: AppConfig) -> None:
        import torch

        keep_on_node_address()
        set_up(config.log_level)
        # torch's own first seed is fixed: requests without a seed would repeat after every restart
        torch.seed()
        model, tokenizer = config.load()
        limits = EngineConfig(cache_tokens=config.cache_tokens) if config.cache_tokens else None
        engines = 1 if config.num_gpus >= 1 else config.max_replicas  # that may share this one's memory
        self._engine = pm.Engine(model, tokenizer, limits, num_engines=engines)
        self._shelf = AdapterRegistry(self._engine, config)
        self._meters = EngineMetrics(self._engine.stats, self._shelf.loaded)
        threads = config.num_threads or max(1, (os.cpu_count() or 1) // config.max_replicas)
        self._stepper = EngineLoop(self._engine, self._meters.stepped, config.stuck_s, threads)
        self._limits, self._held = config, dict[str, _Held]()
        self._name = serve.get_replica_context().replica_id.unique_id

    async def decode(self, work: EngineRequest) -> AsyncIterator[Packed | RejectedRequest]:
        """What is added to a sample, step by step; first how its branches begin. A Refusal is all there is of
        a wrong one.
        """
        try:
            adapter = await self._shelf.ready(work.model, work.version)
            with self._engine.state_lock:  # it may end within the next millisecond
                number = self._stepper.begin(work, adapter)
                begun = self._begun(number, work)
        except pm.UserError as error:
            yield _refusal(error)
            return
        self._held[work.id] = _Held.of(number, work)
        try:
            yield packed(StepOutput([], begun, self._shelf.version(adapter)))
            while (step := await self._stepper.next(number)) is not None:
                yield packed(step)
        finally:
            del self._held[work.id]
            self._stepper.drop(number)

    def _begun(self, number: int, work: EngineRequest) -> list[BranchStarted]:
        prompts = work.asked.tokens.split()[1:]
        places = self._engine.start_pos2d(number)[: len(prompts)]
        return [
            BranchStarted(branch, *given)
            for branch, given in enumerate(zip(prompts, work.asked.params, places, strict=True))
        ]

    async def join(self, sample: str, ids: list[int], params: SamplingParams) -> int | RejectedRequest | None:
        """Add a branch; returns its number, and None if the sample is not here."""
        held = self._held.get(sample)
        if held is None:
            return None
        try:
            self._require_room(held, len(ids))
            with self._engine.state_lock:
                branch = self._engine.join(
                    held.number, ids, **{name: getattr(params, name) for name in params.__slots__}
                )
                begun = BranchStarted(branch, ids, params, self._engine.start_pos2d(held.number)[branch])
        except pm.UserError as error:
            return _refusal(error)
        held.branches, held.prompt_tokens = held.branches + 1, held.prompt_tokens + len(ids)
        self._stepper.tell_begun(held.number, begun)
        return branch

    def _require_room(self, held: _Held, tokens: int) -> None:
        """Raises UserError for a branch with which the sample would be larger than one may begin."""
        branches, read = self._limits.max_branches, self._limits.max_prompt_tokens
        if held.branches >= branches:
            raise pm.UserError(
                f"text: branch {held.branches + 1} of its sample, {branches} allowed; begin another sample"
            )
        if held.prompt_tokens + tokens > read:
            told = f"{held.prompt_tokens + tokens} prompt tokens with the rest of its sample, {read} allowed"
            raise pm.UserError(f"text: {told}; shorten it or begin another sample")

    async def cancel(self, sample: str, branch: int | None) -> bool:
        """End a sample or one of its branches; says whether the sample is here."""
        held = self._held.get(sample)
        if held is not None:
            self._stepper.cancel(held.number, branch)
        return held is not None

    async def alive(self) -> None:
        """Raises Stuck if the engine computes no more."""
        self._stepper.check()

    def __del__(self) -> None:
        """Serve calls this once the last request has ended."""
        self._stepper.stop()

    async def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica that raises or does not answer."""
        self._stepper.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of replicas follows, see `serving.engine.autoscaling`."""
        load = self._engine.stats()
        return {"live_branches": load.live_branches, "waiting_branches": load.waiting_branches}

    async def meters(self) -> tuple[str, list[Family]]:
        """This process' name, and its meters."""
        return self._name, self._meters.families()


def _refusal(error: pm.UserError) -> RejectedRequest:
    return RejectedRequest(
        str(error),
        429 if isinstance(error, CapacityError) else 503 if isinstance(error, AdapterVersionGone) else 400,
    )
