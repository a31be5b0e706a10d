"""Holds the model and decodes one sample at a time. Knows no Ray: the application turns it into a deployment."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import parallelmind as pm  # loads torch on use only: the ingress imports this module too, and needs none
from serving.ports import keep_on_node_address
from serving.settings import AppConfig


class Piece(NamedTuple):
    """What one decoded token adds to one branch; finish_reason is set on a branch's last."""

    branch: int
    text: str
    finish_reason: str | None


class Step(NamedTuple):
    """The pieces that have come since the last step, and the length of the whole prompt in tokens."""

    prompt_tokens: int
    pieces: list[Piece]


class Refusal(NamedTuple):
    """Why a sample is not decoded. A value and no exception: Serve would log each one's traceback as a failure."""

    message: str


class Engine:
    """One model behind one lock: the branches of a sample share each forward pass, samples take turns."""

    def __init__(self, config: AppConfig) -> None:
        import torch

        keep_on_node_address()
        torch.seed()  # torch's own first seed is fixed: requests without a seed would repeat after every restart
        self._model, self._tokenizer = config.load()
        self._turn = asyncio.Lock()

    async def decode(self, main: str, branches: list[str], sampling: dict[str, Any]) -> AsyncIterator[Step | Refusal]:
        """Continue every branch. Closing the iterator, or cancelling the task that reads it, ends the decoding.

        sampling: fields of `pm.SamplingParams`. What `pm.stream` raises a UserError for is a lone Refusal here.
        """
        async with self._turn:
            decoding = _Decoding(self._model, self._tokenizer, pm.Sample(main, branches), sampling)
            work = asyncio.ensure_future(asyncio.to_thread(decoding.run))
            try:
                while pieces := await decoding.arrived():
                    yield Step(decoding.prompt_tokens, pieces)
                await work  # raises what the thread has raised
            except pm.UserError as error:
                yield Refusal(str(error))
            finally:
                decoding.stop()
                await asyncio.wait([work])  # the next sample's turn comes when the model is free: one forward pass at most


class _Decoding:
    """One sample on its way: a thread decodes and the event loop collects, so that it is free for other requests."""

    def __init__(self, model: Any, tokenizer: Any, sample: pm.Sample, sampling: dict[str, Any]) -> None:
        self.prompt_tokens = 0
        self._given = (model, tokenizer, sample)
        self._sampling = sampling
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._stopped = threading.Event()

    def run(self) -> None:
        """The thread's part."""
        from parallelmind.decoding.samples import encode_sample

        _, tokenizer, sample = self._given
        try:
            self.prompt_tokens = len(encode_sample(tokenizer, sample).ids)
            for event in pm.stream(*self._given, **self._sampling):
                self._put(Piece(event.branch, event.text, event.finish_reason))
                if self._stopped.is_set():
                    break
        finally:
            self._put(None)

    def stop(self) -> None:
        self._stopped.set()

    async def arrived(self) -> list[Piece]:
        """Waits for a piece and takes along what else is there: one message per step, not per token. Empty at the end."""
        items = [await self._queue.get()]
        while not self._queue.empty():
            items.append(self._queue.get_nowait())
        if items[-1] is None and len(items) > 1:
            self._queue.put_nowait(None)  # for the next call
        return [item for item in items if item is not None]

    def _put(self, item: Piece | None) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
