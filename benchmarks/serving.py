"""The server against the bare engine, and under load, kills and clients that leave."""

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
from benchmarks.load import Answer, Client, asking, steadily, together
from benchmarks.text import tokenizer
from serving.runtime.ports import free_port

_STREAMS, _TOKENS, _FIRSTS, _WARM = 32, 64, 60, 5
_BURST, _ROOM = 200, 10
_LEAVERS = 500
_KILL_EVERY_S, _KILLING_S = 20, 180
_START_S = 180


@contextmanager
def server(**fields: Any) -> Iterator[str]:
    """`python -m serving` with SmolLM2 as it is, isolated branches and all threads of the machine; gives its
    URL.
    """
    port = free_port()
    given = {"base_model": "smollm2-135m", "visibility": "isolated", "port": port, **fields}
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "serving", *(f"{name}={value}" for name, value in given.items())]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        try:
            _wait(process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)


def _wait(process: subprocess.Popen[str], log: Any) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        log.seek(0)
        if "Ctrl-C" in log.read():
            return
        time.sleep(0.2)
    log.seek(0)
    raise TimeoutError(f"no server:\n{log.read()}")


def _body(text: list[int], **changes: Any) -> dict[str, Any]:
    same = {"model": "base", "max_tokens": _TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
    return {**same, "prompt": text, **changes}


def meter(url: str, name: str) -> float:
    """The sum of a meter over all processes."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"parallelmind_{name}[{{ ]", line))


def engines() -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if "EngineReplica" in " ".join(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _added_to_first_token() -> float:
    """Milliseconds: median of what a request takes longer than the engine alone, asked in turn so that both
    see one machine.
    """
    engine, text = pm.Engine(patched("isolated", "float32"), tokenizer()), prompts(1)[0]

    def first() -> None:
        number = engine.submit(pm.Sample(branches=[text]), max_new_tokens=1)
        while not engine.step():
            pass
        engine.cancel(number)

    async def pairs(url: str) -> list[float]:
        client = asking(url, _body(text, max_tokens=1))
        async with aiohttp.ClientSession() as session:
            for _ in range(_WARM):
                await client(session)
                first()
            return [((await client(session)).first or 0) - seconds(first) for _ in range(_FIRSTS)]

    with server() as url:
        return 1e3 * median(asyncio.run(pairs(url)))


def _streams_vs_engine() -> float:
    """Tokens/s of concurrent streams over those of the engine alone on the same prompts, before the server is
    up and after.
    """
    engine, texts = pm.Engine(patched("isolated", "float32"), tokenizer()), prompts(_STREAMS)

    def alone() -> None:
        for text in texts:
            engine.submit(pm.Sample(branches=[text]), max_new_tokens=_TOKENS, ignore_eos=True)
        while engine.busy:
            engine.step()

    def pair() -> float:
        bare = seconds(alone)
        with server() as url:
            clients = [asking(url, _body(text)) for text in texts]
            asyncio.run(together(clients))
            served = seconds(lambda: asyncio.run(together(clients)))
        return (bare + seconds(alone)) / 2 / served

    alone()
    return median(pair() for _ in range(3))


@cache
def _burst() -> list[Answer]:
    with server(max_requests=_ROOM) as url:
        client = asking(url, _body(prompts(1)[0], stream=False, max_tokens=16))
        asyncio.run(together([client]))
        return asyncio.run(together([client] * _BURST))


def _refused_in() -> float:
    """Milliseconds until all but one in a hundred of those that are refused know it."""
    refused = [1e3 * answer.last for answer in _burst() if answer.status == 429]
    return quantiles(refused, n=100)[-1]


def _neither() -> float:
    """Answers of a burst that are neither 200 nor 429."""
    return sum(answer.status not in (200, 429) for answer in _burst())


def _gone_in() -> float:
    """Seconds after the last of many clients has left, half of them while they were queued, until nobody is
    at work.
    """

    async def leave(session: aiohttp.ClientSession, url: str, number: int) -> None:
        body = _body(prompts(1)[0], stream=number % 2 == 0, max_tokens=512)
        request = asyncio.ensure_future(asking(url, body)(session))
        await asyncio.sleep(2 + number / _LEAVERS)
        request.cancel()

    async def everybody(url: str) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(leave(session, url, number) for number in range(_LEAVERS)))

    # A cache for half of them.
    with server(max_requests=2 * _LEAVERS, cache_tokens=_LEAVERS // 2 * 544) as url:
        asyncio.run(everybody(url))
        return seconds(lambda: _until_idle(url))


def _until_idle(url: str) -> None:
    while (
        meter(url, "live_branches") + meter(url, "waiting_branches") + meter(url, "open_requests") > 1
    ):  # this one
        time.sleep(0.02)


def _completed_under_kills() -> float:
    """Share of requests that are answered whole, at about 60 % load, while one of two engines is killed again
    and again.
    """
    texts = prompts(16)

    async def run(url: str) -> list[Answer]:
        def client(number: int) -> Client:
            return asking(url, _body(texts[number % 16], stream=number % 2 == 0, max_tokens=48))

        work = asyncio.ensure_future(steadily(client, 1.2, _KILLING_S))
        while not work.done():
            await asyncio.wait([work], timeout=_KILL_EVERY_S)
            if not work.done() and (found := engines()):
                os.kill(found[0].pid, signal.SIGKILL)
        return await work

    with server(min_replicas=2, max_replicas=2) as url:
        answers = asyncio.run(run(url))
    return sum(answer.whole for answer in answers) / len(answers)


BENCHES = [
    Bench("serving.added_to_first_token_ms", 10, "lower", "ms", _added_to_first_token),
    Bench("serving.streams32_vs_engine", 0.9, "higher", "ratio", _streams_vs_engine),
    Bench("serving.burst200_neither_200_nor_429", 0, "lower", "answers", _neither),
    Bench("serving.burst200_refused_p99_ms", 250, "lower", "ms", _refused_in),
    Bench("serving.disconnect500_idle_after_s", 2, "lower", "s", _gone_in),
    Bench("serving.completed_under_kills", 1.0, "higher", "share", _completed_under_kills),
]
