"""How long an engine is silent while it loads an adapter: its event loop, and a stream that is decoded."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import nn

import parallelmind as pm
from benchmarks.decoding import patched
from benchmarks.harness import Bench
from benchmarks.text import tokenizer
from parallelmind.config import LoraConfig, ModelConfig
from parallelmind.engine.tokenization import tokenize_request
from parallelmind.model.adapter import add_lora, save_adapter
from parallelmind.model.adapter_copy import shared_copy
from parallelmind.model.patch_state import rope_config
from serving.config import AppConfig
from serving.engine.adapter_registry import AdapterRegistry
from serving.engine.loop import EngineLoop
from serving.engine.messages import EngineRequest

_ADAPTERS, _TICK_S, _SETTLE_S = 3, 0.001, 1.0
_LORA = LoraConfig(lora_rank=16, lora_targets="all-linear")


class Silence(NamedTuple):
    """The longest times without a turn of the event loop and without a token of the stream, in ms."""

    event_loop_ms: float
    stream_ms: float


class _Gaps:
    """The longest time between two calls of `mark`."""

    def __init__(self) -> None:
        self.longest_s, self._last = 0.0, perf_counter()

    def mark(self) -> None:
        now = perf_counter()
        self.longest_s, self._last = max(self.longest_s, now - self._last), now


@cache
def _silence() -> Silence:
    """Measured while three adapters of rank 16 on all layers are loaded, one after another."""
    model = patched("isolated", "float32")
    with TemporaryDirectory() as folder:
        for seed in range(_ADAPTERS):
            _save_adapter(model, Path(folder) / str(seed), seed)
        return asyncio.run(_while_loading(model, folder))


def _save_adapter(model: Any, folder: Path, seed: int) -> None:
    adapted = add_lora(shared_copy(model), _LORA, seed)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.01)
    base = ModelConfig(base_model="smollm2-135m")
    save_adapter(adapted, tokenizer(), folder, base, rope_config(model), _LORA)


async def _while_loading(model: Any, folder: str) -> Silence:
    engine = pm.Engine(model, tokenizer())
    loop = EngineLoop(engine, lambda *_: None, stuck_s=60, num_threads=torch.get_num_threads())
    config = AppConfig.of({"base_model": "smollm2-135m", "adapter_root": folder})
    registry, turns, tokens = AdapterRegistry(engine, config), _Gaps(), _Gaps()
    sampling = {"max_new_tokens": 4096, "ignore_eos": True}
    tokenized = tokenize_request(tokenizer(), pm.Sample("The sky is", [" blue"]), None, None, sampling)
    running = await loop.submit(EngineRequest("bench", "base", [tokenized]), None)

    async def turn() -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            turns.mark()

    async def read() -> None:
        while (step := await loop.next_output(running)) is not None:
            if step.events:
                tokens.mark()

    tasks = [asyncio.create_task(turn()), asyncio.create_task(read())]
    await asyncio.sleep(_SETTLE_S)
    turns.longest_s = tokens.longest_s = 0
    for seed in range(_ADAPTERS):
        async with registry.use(f"base:{seed}"):
            await asyncio.sleep(_SETTLE_S)
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    loop.stop()
    return Silence(1e3 * turns.longest_s, 1e3 * tokens.longest_s)


BENCHES = [
    Bench("serving.adapter_load_silence_ms", 50, "lower", "ms", lambda: _silence().event_loop_ms),
    Bench("serving.adapter_load_stream_pause_ms", None, "lower", "ms", lambda: _silence().stream_ms),
]
