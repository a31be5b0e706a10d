"""Events per second that ingress processes pass on from an engine with a tiny model, and what one costs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple

import aiohttp
import psutil
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Bench
from benchmarks.servers import HttpServer, parallelmind_server
from benchmarks.text import tokenizer

_STREAMS, _TOKENS, _WARM_UP_TOKENS = 64, 256, 16


class Passed(NamedTuple):
    """Events per second by the clock, and microseconds of processor time of the ingress for each of them."""

    per_s: float
    cpu_us: float


@cache
def _passed(num_fronts: int) -> Passed:
    """Measured with concurrent streams, whose events hold one token each."""
    with _served(num_fronts) as server:
        fronts = _fronts(server)
        if len(fronts) != num_fronts:
            raise RuntimeError(f"{len(fronts)} ingress processes run, not {num_fronts}")
        asyncio.run(_count_events(server.url, _WARM_UP_TOKENS))
        start, cpu_s = perf_counter(), sum(map(_cpu_s, fronts))
        events = asyncio.run(_count_events(server.url, _TOKENS))
        seconds, cpu_s = perf_counter() - start, sum(map(_cpu_s, fronts)) - cpu_s
    return Passed(events / seconds, 1e6 * cpu_s / events)


@contextmanager
def _served(num_fronts: int) -> Iterator[HttpServer]:
    with TemporaryDirectory() as folder:
        base = Path(folder) / "tiny"
        sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        heads: Any = {"num_attention_heads": 1, "num_key_value_heads": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), **sizes, **heads)).save_pretrained(base)
        tokenizer().save_pretrained(base)
        with parallelmind_server(base_model=base, num_fronts=num_fronts, cache_tokens=65536) as server:
            yield server


def _fronts(server: HttpServer) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return [process for process in children if ":Ingress" in " ".join(process.cmdline())]


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def _count_events(url: str, tokens: int) -> int:
    """The events of all streams; they are counted and not parsed, since the client shares the processors."""
    body = {"model": "base", "prompt": "The sky is", "max_tokens": tokens, "ignore_eos": True}
    body |= {"temperature": 0, "logprobs": 0, "stream": True}  # an event also for a token without text

    async def count(session: aiohttp.ClientSession) -> int:
        events = 0
        async with session.post(f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                events += line.startswith(b"data: {")
        return events

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        counts = await asyncio.gather(*(count(session) for _ in range(_STREAMS)))
    if set(counts) != {tokens}:
        raise RuntimeError(f"{url}: streams of {sorted(set(counts))} events, not {tokens}")
    return sum(counts)


BENCHES = [
    Bench("serving.front_events_per_s", None, "higher", "events/s", lambda: _passed(1).per_s),
    Bench("serving.front_events_per_s_of_two", None, "higher", "events/s", lambda: _passed(2).per_s),
    Bench("serving.front_cpu_us_per_event", None, "lower", "us", lambda: _passed(1).cpu_us),
]
