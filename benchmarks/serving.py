"""The server: latency and throughput against the bare engine; bursts, disconnects and killed replicas."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from statistics import median, quantiles
from typing import Any

import aiohttp
import openai
import psutil

import parallelmind as pm
from benchmarks.clients import catalog, install
from benchmarks.comparison import DTYPE
from benchmarks.decoding import patched, prompts
from benchmarks.harness import Bench, UnavailableError, ratio, seconds
from benchmarks.load import Answer, Client, at_rate, completion_client, concurrently
from benchmarks.peers.install import is_installed
from benchmarks.servers import HttpServer, parallelmind_server, vllm_server
from benchmarks.text import passages, tokenizer
from parallelmind.config import ModelConfig
from parallelmind.model.base_model import resolve_base_model

_STREAMS, _TOKENS, _FIRST_TOKENS, _WARM_UP = 32, 64, 60, 5
_BURST, _MAX_REQUESTS = 200, 10
_DISCONNECTS = 500
_KILL_EVERY_S, _KILLING_S = 20, 180
_TURNS = 3
_DOCUMENT, _ANSWER_TOKENS = 500, 16
_IGNORE_EOS = {"ignore_eos": True}


@contextmanager
def server(**fields: Any) -> Iterator[str]:
    """Run `python -m serving` with unadapted SmolLM2 and isolated branches; yield its URL."""
    with parallelmind_server(**fields) as running:
        yield running.url


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

    Both are compiled. The server is paused while the engine decodes.
    """
    engine, texts = pm.Engine(patched("isolated", "float32"), tokenizer()), prompts(_STREAMS)
    engine.warm_up()

    def engine_alone() -> None:
        for text in texts:
            engine.submit(pm.Sample(branches=[text]), max_new_tokens=_TOKENS, ignore_eos=True)
        while engine.busy:
            engine.step()

    with parallelmind_server() as served:
        served.pause()
        return ratio(engine_alone, lambda: _run_streams(served, texts), repeats=_TURNS)


def _streams_vs_vllm() -> float:
    """Tokens/s of concurrent streams over those of vLLM's server: one client, the same prompts, in turns.

    The server whose turn it is not is paused.
    """
    if not is_installed("vllm"):
        raise UnavailableError("vLLM is not installed; run make bench-peers")
    dtype, texts = DTYPE, prompts(_STREAMS)
    with vllm_server(dtype) as theirs:
        theirs.pause()
        with parallelmind_server(dtype=dtype) as ours:
            ours.pause()
            return ratio(lambda: _run_streams(theirs, texts), lambda: _run_streams(ours, texts), _TURNS)


def _run_streams(running: HttpServer, texts: Sequence[list[int]]) -> None:
    """Stream all texts at the same time from a paused server. Raises RuntimeError for an incomplete one."""
    clients = [completion_client(running.url, _body(text)) for text in texts]
    running.resume()
    try:
        answers = asyncio.run(concurrently(clients))
    finally:
        running.pause()
    if failed := [answer for answer in answers if not answer.complete]:
        raise RuntimeError(f"{running.url}: {len(failed)} incomplete streams: {failed[0].error}")


def _document_vs_stock() -> float:
    """Seconds of eight requests, one after the other, over those of one request that shares the document.

    All by a stock client of OpenAI. No cache holds the documents at first.
    """
    documents = _documents()
    with server() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        ask = partial(client.completions.create, model="base", max_tokens=_ANSWER_TOKENS, temperature=0)

        def together() -> None:
            document, questions = next(documents)
            ask(prompt=questions, extra_body={"main": document, **_IGNORE_EOS})

        def one_by_one() -> None:
            document, questions = next(documents)
            for question in questions:
                ask(prompt=[*document, *question], extra_body=_IGNORE_EOS)

        return ratio(one_by_one, together, _TURNS)


def _documents() -> Iterator[tuple[list[int], list[list[int]]]]:
    """Different documents of 500 tokens, with eight questions each."""
    ids = [token for main, _ in passages(240) for token in main]
    for start, (_, questions) in zip(range(0, len(ids), _DOCUMENT), passages(240), strict=False):
        yield ids[start : start + _DOCUMENT], questions


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


def _clients_passed() -> float:
    """Count the unmodified clients of OpenAI's API that pass all of their checks."""
    if not install.is_installed():
        raise UnavailableError("the clients are not installed; run make clients")
    model = ModelConfig().base_model
    passed = 0
    with server() as url:
        target = catalog.Server(f"{url}/v1", model, str(resolve_base_model(model)))
        for name, client in catalog.CLIENTS.items():
            done = client.run(target)
            passed += done.returncode == 0
            if done.returncode:
                print(f"{name} failed:\n{done.stdout}", file=sys.stderr)
    return passed


BENCHES = [
    Bench("serving.added_to_first_token_ms", 10, "lower", "ms", _added_to_first_token),
    Bench("serving.streams32_vs_engine", 0.92, "higher", "ratio", _streams_vs_engine),
    Bench("serving.streams32_vs_vllm", 1.0, "higher", "ratio", _streams_vs_vllm, DTYPE),
    Bench("serving.document8_vs_stock", 4, "higher", "ratio", _document_vs_stock),
    Bench("serving.burst200_neither_200_nor_429", 0, "lower", "answers", _unexpected_statuses),
    Bench("serving.burst200_refused_p99_ms", 250, "lower", "ms", _rejection_p99_ms),
    Bench("serving.disconnect500_idle_after_s", 2, "lower", "s", _idle_after_disconnects),
    Bench("serving.completed_under_kills", 1.0, "higher", "share", _completed_under_kills),
    Bench("serving.clients_passed", len(catalog.CLIENTS), "higher", "clients", _clients_passed),
]
