"""A request for an engine, an EngineLoop that is stopped after its test, and the stream of a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asgi import make_ingress
from engines import COLUMNAR, tiny_engine
from starlette.types import ASGIApp
from tiny import tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.engine.tokenization import tokenize_request
from parallelmind.errors import UserError
from serving.engine.loop import EngineLoop, RunningRequest
from serving.engine.messages import EngineRequest, PackedStep, RejectedRequest, StepOutput, pack_step
from serving.ingress.ingress import Ingress

MAIN, BRANCHES = list(range(50, 70)), [[5, 6, 7], [8], list(range(100, 112))]


def sample_request(
    reduce: bool = False, lengths: Sequence[int] = (9, 4, 6), **settings: Any
) -> EngineRequest:
    """Three seeded branches of different lengths, with or without a reduce branch."""
    per_branch = [{"max_new_tokens": length} for length in lengths]
    sampling = {"temperature": 1.0, "seed": 3, "ignore_eos": True, "max_new_tokens": 5, **settings}
    sample, reduce_ids = Sample(MAIN, BRANCHES), [41, 42] if reduce else None
    tokenized = tokenize_request(tiny_tokenizer(), sample, per_branch, reduce_ids, sampling)
    return EngineRequest("smp-1", "base", [tokenized])


@contextmanager
def running_loop(engine: Any, stuck_s: float = 60) -> Iterator[EngineLoop]:
    loop = EngineLoop(engine, lambda *_: None, stuck_s, num_threads=1)
    try:
        yield loop
    finally:
        loop.stop()


class LoopStream:
    """Stands for the response of a streaming call: a request that an engine decodes in this process."""

    def __init__(self, loop: EngineLoop, request: EngineRequest) -> None:
        self._loop, self._request = loop, request
        self._running: RunningRequest | None = None

    async def __aiter__(self) -> AsyncIterator[PackedStep | RejectedRequest]:
        try:
            running = self._running = await self._loop.submit(self._request, None)
        except UserError as error:
            yield RejectedRequest(str(error))
            return
        yield pack_step(StepOutput([], running.started, adapter_version=""))
        while (step := await self._loop.next_output(running)) is not None:
            yield pack_step(step)

    def cancel(self) -> None:
        """Called when the reader closes the stream."""
        if self._running is not None:
            self._loop.release(self._running)
            self._running = None


def with_server(
    folder: Path,
    act: Callable[[ASGIApp, Engine, Ingress], Coroutine[Any, Any, Any]],
    config: RopeConfig = COLUMNAR,
    **limits: float,
) -> Any:
    """Call `act` with an application in front of an engine of a tiny model. limits: of the engine."""
    engine = tiny_engine(config, **{"cache_tokens": 8192, **limits})

    async def run() -> Any:
        with running_loop(engine) as loop:
            ingress = make_ingress(folder, open_stream=lambda request: LoopStream(loop, request))
            app = ingress.__serve_build_asgi_app__()
            return await asyncio.wait_for(act(app, engine, ingress), 60)

    return asyncio.run(run())
