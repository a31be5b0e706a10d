"""Thousands of wrong and strange requests: a server must answer them all, never fail, and not die of them."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from tempfile import TemporaryDirectory
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

from benchmarks.fuzzed import requests
from benchmarks.harness import Bench
from benchmarks.oddities import LIVE, post
from benchmarks.serving import server

_COUNT, _CLIENTS = 10_000, 12
_TIMEOUT_S = 30
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
_LENGTH = re.compile(rb"content-length: (\d+)")
_PAGES = (b"HEAD ", b"GET / ", b"GET /web/")  # without a body, and with one that is not for programs
_SAMPLE = re.compile(rb"smp-\w+")
_BODY = '{"model": "base", "branches": [{"text": "a"}, {"text": "b"}], "stream": true, "ignore_eos": true%s}'
_LONG = [post("/v1/branches", (_BODY % last).encode()) for last in ("", ', "reduce": "c"')]
_SHOWN = 300  # bytes of a request that has gone wrong


class Reply(NamedTuple):
    status: int
    head: bytes
    body: bytes

    @property
    def whole(self) -> bool:
        """Whether no more of it can come, even if the connection stays open."""
        length = _LENGTH.search(self.head)
        return self.body.endswith(b"0\r\n\r\n") if length is None else len(self.body) >= int(length[1])

    @property
    def failed(self) -> bool:
        """A stream whose status is out already says so in its last events, or is cut off."""
        cut = b"transfer-encoding: chunked" in self.head and not self.whole
        return self.status >= 500 or (self.status == 200 and (cut or b'"type":"server_error"' in self.body))

    @property
    def shapeless(self) -> bool:
        """Refused by our routes, not by the proxy in front of them, and other than OpenAI's clients
        expect.
        """
        if self.status < 400 or b"\r\nx-request-id:" not in self.head:
            return False
        try:
            return not isinstance(json.loads(self.body)["error"]["message"], str)
        except (ValueError, TypeError, KeyError):
            return True


@dataclass(slots=True)
class Findings:
    """What came back. failed, shapeless: requests with their replies. silent: those without one in time."""

    statuses: Counter[int] = field(default_factory=Counter)
    failed: list[tuple[bytes, Reply]] = field(default_factory=list)
    shapeless: list[tuple[bytes, Reply]] = field(default_factory=list)
    silent: list[bytes] = field(default_factory=list)

    def add(self, request: bytes, reply: Reply | None) -> None:
        if reply is None:
            self.silent.append(request)
            return
        self.statuses[reply.status] += 1
        if reply.failed:
            self.failed.append((request, reply))
        elif reply.shapeless and not request.startswith(_PAGES):
            self.shapeless.append((request, reply))

    def __str__(self) -> str:
        counts = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()))
        wrong = [
            f"{reply.status} to {request[:_SHOWN]!r}: {reply.body[:_SHOWN]!r}"
            for request, reply in self.failed
        ]
        return "\n".join([counts, *wrong, *(f"no answer to {request[:_SHOWN]!r}" for request in self.silent)])


def fuzz(url: str, count: int, seed: int = 0) -> Findings:
    """Send so many requests, some at a time, the same for the same document and seed."""
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=_TIMEOUT_S) as response:
        document = json.load(response)
    return asyncio.run(_send(urlsplit(url).port or 80, requests(document, count, seed)))


async def _send(port: int, waiting: list[bytes]) -> Findings:
    findings, live, left = Findings(), _Live(), iter(waiting)

    async def client() -> None:
        for each in left:
            request = each.replace(LIVE.encode(), live.name, 1)
            findings.add(request, await _reply(port, request))

    async def keep_one_alive() -> None:
        for each in cycle(_LONG):
            findings.add(each, await _reply(port, each, live.look))

    keeper = asyncio.create_task(keep_one_alive())
    await asyncio.gather(*(client() for _ in range(_CLIENTS)))
    keeper.cancel()
    return findings


class _Live:
    """Which sample is going on, for others to join, cancel and confuse."""

    def __init__(self) -> None:
        self.name = b"none"

    def look(self, heard: bytes) -> None:
        if found := _SAMPLE.search(heard):
            self.name = found[0]


async def _reply(port: int, request: bytes, look: Callable[[bytes], None] = lambda _: None) -> Reply | None:
    """look: is shown each part."""
    heard, reply = b"", None
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                while (reply is None or not reply.whole) and (part := await reader.read(1 << 16)):
                    look(part)
                    heard += part
                    reply = _read(heard)
            finally:
                writer.close()
    except TimeoutError:
        return None
    except OSError:  # it has closed while we were still writing
        pass
    return reply


def _read(heard: bytes) -> Reply | None:
    """What has come of a reply; others before it only say to go on."""
    head, end, rest = heard.partition(b"\r\n\r\n")
    status = _STATUS.match(head)
    if not end or status is None:
        return None
    return _read(rest) if status[1].startswith(b"1") else Reply(int(status[1]), head.lower(), rest)


def replicas() -> Iterator[tuple[int, float]]:
    """The fronts and engines of servers that this process has started, in a way that tells a successor from
    what it replaces.
    """
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if re.search("EngineReplica|Front", " ".join(process.cmdline())):
                yield process.pid, process.create_time()


def _failures() -> float:
    """5xx, requests without an answer, and fronts and engines that have died."""
    limits = {"max_new_tokens": 16, "max_prompt_tokens": 512, "slow_client_s": 2}
    with TemporaryDirectory() as adapters, server(adapter_root=adapters, **limits) as url:
        before = set(replicas())
        findings = fuzz(url, _COUNT)
        died = before - set(replicas())
    print(findings, file=sys.stderr)
    return len(findings.failed) + len(findings.silent) + len(died)


BENCHES = [Bench("serving.fuzz10000_failures", 0, "lower", "answers", _failures)]
