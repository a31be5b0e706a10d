"""Engines that come and go with the load, while clients are answered."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from typing import Any

from benchmarks.decoding import prompts
from benchmarks.harness import Bench
from benchmarks.load import Answer, asking, together
from benchmarks.serving import server

_PHASES = [(1, 1), (24, 2), (1, 1)]  # clients, and how many engines they call for
_WAIT_S = 120


def _failures() -> float:
    """Requests that are not answered whole while load comes and goes, and one more for engines that do not
    follow it.
    """
    answers, followed = list[Answer](), True
    with server(max_replicas=2, branches_per_replica=8, idle_s=5) as url:
        for clients, engines in _PHASES:
            end = time.monotonic() + _WAIT_S
            answers += _round(url, clients)
            while (up := _engines(url)) != engines and time.monotonic() < end:
                answers += _round(url, clients)
            answers += _round(url, clients)
            followed = followed and up == engines
    return sum(not answer.whole for answer in answers) + (not followed)


def _round(url: str, clients: int) -> list[Answer]:
    """Every client asks once, every other one for a stream."""
    body: dict[str, Any] = {
        "model": "base",
        "prompt": prompts(1)[0],
        "max_tokens": 48,
        "temperature": 0,
        "ignore_eos": True,
    }
    return asyncio.run(
        together([asking(url, {**body, "stream": number % 2 == 0}) for number in range(clients)])
    )


def _engines(url: str) -> int:
    """How many answer."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        return len(re.findall(r"^parallelmind_cache_tokens\{", response.read().decode(), re.MULTILINE))


BENCHES = [Bench("serving.idle_load_idle_failures", 0, "lower", "requests", _failures)]
