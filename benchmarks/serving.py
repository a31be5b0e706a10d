"""The server: latency and throughput against the bare engine; bursts, disconnects and killed replicas."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from statistics import median, quantiles
from typing import Any

import aiohttp
import psutil

import parallelmind as pm
from benchmarks.decoding import patched, prompts
from benchmarks.harness import Bench, seconds
from benchmarks.load import Answer, Client, at_rate, completion_client, concurrently
from benchmarks.text import tokenizer
from serving.runtime.ports import free_port

_STREAMS, _TOKENS, _FIRST_TOKENS, _WARM_UP = 32, 64, 60, 5
_BURST, _MAX_REQUESTS = 200, 10
_DISCONNECTS = 500
_KILL_EVERY_S, _KILLING_S = 20, 180
_START_S = 180


@contextmanager
def server(**fields: Any) -> Iterator[str]:
    """Run `python -m serving` with unadapted SmolLM2 and isolated branches; yield its URL."""
    port = free_port()
    settings = {"base_model": "smollm2-135m", "visibility": "isolated", "port": port, **fields}
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "serving", *(f"{name}={value}" for name, value in settings.items())]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            _wait_until_ready(process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def _wait_until_ready(process: subprocess.Popen[str], log: Any) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        log.seek(0)
        if "Ctrl-C" in log.read():
            return
        time.sleep(0.2)
    log.seek(0)
    raise TimeoutError(f"the server did not start:\n{log.read()}")


def _body(text: list[int], **changes: Any) -> dict[str, Any]:
    defaults = {"model": "base", "max_tokens": _TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    return {**defaults, "prompt": text, **changes}


def metric(url: str, name: str) -> float:
    """Return the sum of a metric over all processes."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"parallelmind_{name}[{{ ]", line))


def engines() -> list[psutil.Process]:
    """Return the processes of all engine replicas on this machine."""
    return [process for process in psutil.process_iter() if "EngineReplica" in " ".join(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _added_to_first_token() -> float:
    """Median time to first token through the server minus the engine's own, in ms; measured alternately."""
    engine, text = pm.Engine(patched("isolated", "float32"), tokenizer()), prompts(1)[0]

    def first() -> None:
        number = engine.submit(pm.Sample(branches=[text]), max_new_tokens=1)
        while not engine.step():
            pass
        engine.cancel(number)

    async def pairs(url: str) -> list[float]:
        client = completion_client(url, _body(text, max_tokens=1))
        async with aiohttp.ClientSession() as session:
            for _ in range(_WARM_UP):
                await client(session)
                first()
            return [
                ((await client(session)).first_token_s or 0) - seconds(first) for _ in range(_FIRST_TOKENS)
            ]

    with server() as url:
        return 1e3 * median(asyncio.run(pairs(url)))


def _streams_vs_engine() -> float:
    """Tokens/s of concurrent streams over tokens/s of the engine alone on the same prompts.

    The engine is measured before the server starts and after it stops.
    """
    engine, texts = pm.Engine(patched("isolated", "float32"), tokenizer()), prompts(_STREAMS)

    def engine_alone() -> None:
        for text in texts:
            engine.submit(pm.Sample(branches=[text]), max_new_tokens=_TOKENS, ignore_eos=True)
        while engine.busy:
            engine.step()

    def pair() -> float:
        engine_s = seconds(engine_alone)
        with server() as url:
            clients = [completion_client(url, _body(text)) for text in texts]
            asyncio.run(concurrently(clients))
            served_s = seconds(lambda: asyncio.run(concurrently(clients)))
        return (engine_s + seconds(engine_alone)) / 2 / served_s

    engine_alone()
    return median(pair() for _ in range(3))


@cache
def _burst() -> list[Answer]:
    with server(max_requests=_MAX_REQUESTS) as url:
        client = completion_client(url, _body(prompts(1)[0], stream=False, max_tokens=16))
        asyncio.run(concurrently([client]))
        return asyncio.run(concurrently([client] * _BURST))


def _rejection_p99_ms() -> float:
    """99th percentile of the time to a 429, in milliseconds."""
    rejected = [1e3 * answer.total_s for answer in _burst() if answer.status == 429]
    return quantiles(rejected, n=100)[-1]


def _unexpected_statuses() -> float:
    """Count responses to a burst that are neither 200 nor 429."""
    return sum(answer.status not in (200, 429) for answer in _burst())


def _idle_after_disconnects() -> float:
    """Seconds from the last disconnect until the server is idle; half of the requests are queued."""

    async def disconnect(session: aiohttp.ClientSession, url: str, number: int) -> None:
        body = _body(prompts(1)[0], stream=number % 2 == 0, max_tokens=512)
        request = asyncio.ensure_future(completion_client(url, body)(session))
        await asyncio.sleep(2 + number / _DISCONNECTS)
        request.cancel()

    async def all_clients(url: str) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(disconnect(session, url, number) for number in range(_DISCONNECTS)))

    # The cache holds half of the requests.
    with server(max_requests=2 * _DISCONNECTS, cache_tokens=_DISCONNECTS // 2 * 544) as url:
        asyncio.run(all_clients(url))
        return seconds(lambda: _until_idle(url))


def _until_idle(url: str) -> None:
    names = ("live_branches", "waiting_branches", "open_requests")
    while sum(metric(url, name) for name in names) > 1:  # the request for /metrics itself is open
        time.sleep(0.02)


def _completed_under_kills() -> float:
    """Share of complete responses at about 60 % load while one of two engines is killed repeatedly."""
    texts = prompts(16)

    async def run(url: str) -> list[Answer]:
        def client(number: int) -> Client:
            return completion_client(url, _body(texts[number % 16], stream=number % 2 == 0, max_tokens=48))

        load = asyncio.ensure_future(at_rate(client, 1.2, _KILLING_S))
        while not load.done():
            await asyncio.wait([load], timeout=_KILL_EVERY_S)
            if not load.done() and (replicas := engines()):
                os.kill(replicas[0].pid, signal.SIGKILL)
        return await load

    with server(min_replicas=2, max_replicas=2) as url:
        answers = asyncio.run(run(url))
    return sum(answer.complete for answer in answers) / len(answers)


BENCHES = [
    Bench("serving.added_to_first_token_ms", 10, "lower", "ms", _added_to_first_token),
    Bench("serving.streams32_vs_engine", 0.9, "higher", "ratio", _streams_vs_engine),
    Bench("serving.burst200_neither_200_nor_429", 0, "lower", "answers", _unexpected_statuses),
    Bench("serving.burst200_refused_p99_ms", 250, "lower", "ms", _rejection_p99_ms),
    Bench("serving.disconnect500_idle_after_s", 2, "lower", "s", _idle_after_disconnects),
    Bench("serving.completed_under_kills", 1.0, "higher", "share", _completed_under_kills),
]
