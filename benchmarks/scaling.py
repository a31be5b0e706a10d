"""Autoscaling: engine replicas follow the load while clients are served."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from typing import Any

from benchmarks.decoding import prompts
from benchmarks.harness import Bench
from benchmarks.load import Answer, completion_client, concurrently
from benchmarks.serving import server

_PHASES = [(1, 1), (24, 2), (1, 1)]  # concurrent clients, and the engine replicas that this load requires
_WAIT_S = 120


def _failures() -> float:
    """Count incomplete responses under changing load, plus one if the number of engines does not follow."""
    answers, followed = list[Answer](), True
    with server(max_replicas=2, branches_per_replica=8, idle_s=5) as url:
        for clients, engines in _PHASES:
            end = time.monotonic() + _WAIT_S
            answers += _round(url, clients)
            while (running := _engines(url)) != engines and time.monotonic() < end:
                answers += _round(url, clients)
            answers += _round(url, clients)
            followed = followed and running == engines
    return sum(not answer.complete for answer in answers) + (not followed)


def _round(url: str, clients: int) -> list[Answer]:
    """Every client sends one request; every second one streams."""
    body: dict[str, Any] = {
        "model": "base",
        "prompt": prompts(1)[0],
        "max_tokens": 48,
        "temperature": 0,
        "ignore_eos": True,
    }
    return asyncio.run(
        concurrently(
            [completion_client(url, {**body, "stream": number % 2 == 0}) for number in range(clients)]
        )
    )


def _engines(url: str) -> int:
    """Return the number of engines that report metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        return len(re.findall(r"^parallelmind_cache_tokens\{", response.read().decode(), re.MULTILINE))


BENCHES = [Bench("serving.idle_load_idle_failures", 0, "lower", "requests", _failures)]
