"""A load generator: many clients of one server at once, each of which follows its answer to the end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import aiohttp


@dataclass(slots=True)
class Answer:
    """What a client has seen. Times are seconds since it asked; text: by branch; whole: to the end, without
    an error in it.
    """

    status: int = 0
    first: float | None = None
    last: float = 0.0
    text: dict[int, str] = field(default_factory=dict)
    whole: bool = False
    problem: str | None = None


Client = Callable[[aiohttp.ClientSession], Awaitable[Answer]]


def asking(url: str, body: dict[str, Any]) -> Client:
    """A client of /v1/completions. Streams are read part by part."""

    async def ask(session: aiohttp.ClientSession) -> Answer:
        answer, began = Answer(), perf_counter()
        try:
            async with session.post(f"{url}/v1/completions", json=body) as response:
                answer.status = response.status
                if body.get("stream") and response.status == 200:
                    await _follow(response, answer, began)
                else:
                    _read(await response.json(content_type=None), answer)
        except (aiohttp.ClientError, ValueError, TimeoutError) as error:
            answer.problem = repr(error)
        answer.last = perf_counter() - began
        return answer

    return ask


async def _follow(response: aiohttp.ClientResponse, answer: Answer, began: float) -> None:
    async for line in response.content:
        text = line.decode().removeprefix("data: ").strip()
        if text == "[DONE]":
            answer.whole = answer.problem is None
        elif text:
            answer.first = perf_counter() - began if answer.first is None else answer.first
            _read(json.loads(text), answer)


def _read(body: dict[str, Any], answer: Answer) -> None:
    if "error" in body:
        answer.problem = body["error"]["message"]
        return
    for choice in body["choices"]:
        answer.text[choice["index"]] = answer.text.get(choice["index"], "") + choice["text"]
    answer.whole = "object" in body and answer.status == 200


async def together(clients: Sequence[Client]) -> list[Answer]:
    """All of them at once."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=600)
    ) as session:
        return await asyncio.gather(*(client(session) for client in clients))


async def steadily(next_client: Callable[[int], Client], each_s: float, for_s: float) -> list[Answer]:
    """A new client every `each_s` seconds, whether the others have ended or not; returns when all have."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=600)
    ) as session:
        began, tasks = perf_counter(), list[asyncio.Task[Answer]]()
        while perf_counter() - began < for_s:
            tasks.append(asyncio.ensure_future(next_client(len(tasks))(session)))
            await asyncio.sleep(each_s)
        return list(await asyncio.gather(*tasks))
