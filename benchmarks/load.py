"""Load generator: many concurrent clients of one server, each of which reads its response to the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import aiohttp

_TIMEOUT_S = 600


@dataclass(slots=True)
class Answer:
    """One response. Times are seconds since the request; `text` is by branch.

    `complete`: received to the end, without an error.
    """

    status: int = 0
    first_token_s: float | None = None
    total_s: float = 0.0
    text: dict[int, str] = field(default_factory=dict)
    complete: bool = False
    error: str | None = None


Client = Callable[[aiohttp.ClientSession], Awaitable[Answer]]


def completion_client(url: str, body: dict[str, Any]) -> Client:
    """Return a client that sends one request to /v1/completions and reads a stream event by event."""

    async def request(session: aiohttp.ClientSession) -> Answer:
        answer, start = Answer(), perf_counter()
        try:
            async with session.post(f"{url}/v1/completions", json=body) as response:
                answer.status = response.status
                if body.get("stream") and response.status == 200:
                    await _read_stream(response, answer, start)
                else:
                    _read(await response.json(content_type=None), answer)
        except (aiohttp.ClientError, ValueError, TimeoutError) as error:
            answer.error = repr(error)
        answer.total_s = perf_counter() - start
        return answer

    return request


async def _read_stream(response: aiohttp.ClientResponse, answer: Answer, start: float) -> None:
    async for line in response.content:
        if not line.startswith(b"data: "):  # its id, or a comment
            continue
        text = line.decode().removeprefix("data: ").strip()
        if text == "[DONE]":
            answer.complete = answer.error is None
        else:
            answer.first_token_s = answer.first_token_s or perf_counter() - start
            _read(json.loads(text), answer)


def _read(body: dict[str, Any], answer: Answer) -> None:
    if "error" in body:
        answer.error = body["error"]["message"]
        return
    for choice in body["choices"]:
        answer.text[choice["index"]] = answer.text.get(choice["index"], "") + choice["text"]
    answer.complete = "object" in body and answer.status == 200


def _session() -> aiohttp.ClientSession:
    """Return a session without a connection limit."""
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S))


async def concurrently(clients: Sequence[Client]) -> list[Answer]:
    """Run all clients at the same time."""
    async with _session() as session:
        return await asyncio.gather(*(client(session) for client in clients))


async def at_rate(next_client: Callable[[int], Client], interval_s: float, duration_s: float) -> list[Answer]:
    """Start a client every `interval_s` seconds, independent of the others; return when all have finished."""
    async with _session() as session:
        start, tasks = perf_counter(), list[asyncio.Task[Answer]]()
        while perf_counter() - start < duration_s:
            tasks.append(asyncio.ensure_future(next_client(len(tasks))(session)))
            await asyncio.sleep(interval_s)
        return list(await asyncio.gather(*tasks))
