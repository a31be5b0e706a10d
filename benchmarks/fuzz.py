"""Fuzz a server with thousands of invalid requests: each gets an answer, none a 5xx, no process dies."""

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
_TIMEOUT_S = 120  # a loaded machine decodes 12 long texts in less
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
_LENGTH = re.compile(rb"content-length: (\d+)")
_NOT_JSON = (b"HEAD ", b"GET / ", b"GET /web/")  # responses without a body, or with an HTML body
_SAMPLE_ID = re.compile(rb"smp-\w+")
_BODY = '{"model": "base", "branches": [{"text": "a"}, {"text": "b"}], "stream": true, "ignore_eos": true%s}'
_LONG_REQUESTS = [post("/v1/branches", (_BODY % reduce).encode()) for reduce in ("", ', "reduce": "c"')]
_SHOWN = 300  # bytes printed of a failed request


class Reply(NamedTuple):
    """One HTTP response as received."""

    status: int
    head: bytes
    body: bytes

    @property
    def complete(self) -> bool:
        """True when the body is complete, even if the connection stays open."""
        length = _LENGTH.search(self.head)
        return self.body.endswith(b"0\r\n\r\n") if length is None else len(self.body) >= int(length[1])

    @property
    def failed(self) -> bool:
        """True for a 5xx, for a stream that ends with a server error, and for a stream that was cut off."""
        cut = b"transfer-encoding: chunked" in self.head and not self.complete
        return self.status >= 500 or (self.status == 200 and (cut or b'"type":"server_error"' in self.body))

    @property
    def malformed(self) -> bool:
        """True for an error from our routes (not from the proxy) that lacks OpenAI's error format."""
        if self.status < 400 or b"\r\nx-request-id:" not in self.head:
            return False
        try:
            return not isinstance(json.loads(self.body)["error"]["message"], str)
        except (ValueError, TypeError, KeyError):
            return True


@dataclass(slots=True)
class Findings:
    """Results of a fuzz run: requests with a failed or malformed reply, and requests without a reply."""

    statuses: Counter[int] = field(default_factory=Counter)
    failed: list[tuple[bytes, Reply]] = field(default_factory=list)
    malformed: list[tuple[bytes, Reply]] = field(default_factory=list)
    unanswered: list[bytes] = field(default_factory=list)

    def add(self, request: bytes, reply: Reply | None) -> None:
        if reply is None:
            self.unanswered.append(request)
            return
        self.statuses[reply.status] += 1
        if reply.failed:
            self.failed.append((request, reply))
        elif reply.malformed and not request.startswith(_NOT_JSON):
            self.malformed.append((request, reply))

    def __str__(self) -> str:
        counts = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()))
        failures = [
            f"{reply.status} to {request[:_SHOWN]!r}: {reply.body[:_SHOWN]!r}"
            for request, reply in self.failed
        ]
        return "\n".join(
            [counts, *failures, *(f"no answer to {request[:_SHOWN]!r}" for request in self.unanswered)]
        )


def fuzz(url: str, count: int, seed: int = 0) -> Findings:
    """Send `count` requests, several at a time; the same schema and seed give the same requests."""
    with urllib.request.urlopen(f"{url}/openapi.json", timeout=_TIMEOUT_S) as response:
        schema = json.load(response)
    return asyncio.run(_send(urlsplit(url).port or 80, requests(schema, count, seed)))


async def _send(port: int, queue: list[bytes]) -> Findings:
    findings, live, pending = Findings(), _LiveSample(), iter(queue)

    async def client() -> None:
        for template in pending:
            request = template.replace(LIVE.encode(), live.sample_id, 1)
            findings.add(request, await _reply(port, request))

    async def keep_one_sample_live() -> None:
        for request in cycle(_LONG_REQUESTS):
            findings.add(request, await _reply(port, request, live.read_id))

    keeper = asyncio.create_task(keep_one_sample_live())
    await asyncio.gather(*(client() for _ in range(_CLIENTS)))
    keeper.cancel()
    return findings


class _LiveSample:
    """Id of a running sample; other requests add branches to it, cancel it, or misuse its id."""

    def __init__(self) -> None:
        self.sample_id = b"none"

    def read_id(self, chunk: bytes) -> None:
        if match := _SAMPLE_ID.search(chunk):
            self.sample_id = match[0]


async def _reply(
    port: int, request: bytes, on_chunk: Callable[[bytes], None] = lambda _: None
) -> Reply | None:
    """Send a request and return its reply, None after the timeout. `on_chunk` gets every received chunk."""
    received, reply = b"", None
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                while (reply is None or not reply.complete) and (chunk := await reader.read(1 << 16)):
                    on_chunk(chunk)
                    received += chunk
                    reply = _parse(received)
            finally:
                writer.close()
    except TimeoutError:
        return None
    except OSError:  # the server closed the connection while we were writing
        pass
    return reply


def _parse(received: bytes) -> Reply | None:
    """Parse a reply that may be incomplete; None before the head is complete. Skips interim 1xx replies."""
    head, end, rest = received.partition(b"\r\n\r\n")
    status = _STATUS.match(head)
    if not end or status is None:
        return None
    return _parse(rest) if status[1].startswith(b"1") else Reply(int(status[1]), head.lower(), rest)


def replicas() -> Iterator[tuple[int, float]]:
    """Yield (pid, start time) of the ingress and engine replicas of all servers started by this process."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if re.search("EngineReplica|Ingress", " ".join(process.cmdline())):
                yield process.pid, process.create_time()


def _failures() -> float:
    """Count failed replies, unanswered requests, and replicas that died."""
    limits = {"max_new_tokens": 16, "max_prompt_tokens": 512, "slow_client_s": 2}
    with TemporaryDirectory() as adapters, server(adapter_root=adapters, **limits) as url:
        before = set(replicas())
        findings = fuzz(url, _COUNT)
        died = before - set(replicas())
    print(findings, file=sys.stderr)
    return len(findings.failed) + len(findings.unanswered) + len(died)


BENCHES = [Bench("serving.fuzz10000_failures", 0, "lower", "answers", _failures)]
