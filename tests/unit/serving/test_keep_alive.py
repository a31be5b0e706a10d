"""What a client hears before its first token and between two tokens, and how a request that waits ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from asgi import ONE_TOKEN_STEPS, Reply, ingress_app, post_json
from starlette.types import Message

from serving.engine.messages import RejectedRequest, pack_step
from serving.ingress import engine_client, streaming

BODY = {"model": "tiny", "prompt": "who", "stream": True}


class Engine:
    """Stands for the response of a streaming call. Its messages come when it may start."""

    def __init__(self, *messages: Any, at_once: bool = False) -> None:
        self._messages, self.may_start, self.cancelled = messages, asyncio.Event(), asyncio.Event()
        if at_once:
            self.may_start.set()

    async def __aiter__(self) -> AsyncIterator[Any]:
        await self.may_start.wait()
        for message in self._messages:
            yield message

    def cancel(self) -> None:
        self.cancelled.set()


def test_a_stream_says_that_it_is_alive_while_no_token_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_S", 0.01)
    may_end = asyncio.Event()

    async def chunks() -> AsyncIterator[dict[str, int]]:
        yield {"first": 1}
        await may_end.wait()
        yield {"last": 2}

    async def run() -> bytes:
        body = b""

        async def send(message: Message) -> None:
            nonlocal body
            body += message.get("body", b"")
            if body.count(b": keep-alive\n\n") == 2:
                may_end.set()

        async def receive() -> Message:
            return await asyncio.Future()

        response = streaming.event_stream(chunks(), streaming.StreamPosition("smp-1"))
        await response({"type": "http", "method": "POST"}, receive, send)
        return body

    lines = [line for line in asyncio.run(run()).decode().split("\n\n") if not line.startswith(":")]
    events = ['id: smp-1:1\ndata: {"first":1}', 'id: smp-1:2\ndata: {"last":2}', "data: [DONE]", ""]
    assert lines == events


@pytest.mark.parametrize("fails", [False, True], ids=["answers", "refuses"])
def test_a_stream_says_that_it_is_alive_before_an_engine_takes_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Meanwhile the engine starts, or reads an adapter."""
    for module in (streaming, engine_client):
        monkeypatch.setattr(module, "KEEP_ALIVE_S", 0.01)
    engine = Engine(*([RejectedRequest("model: is gone")] if fails else map(pack_step, ONE_TOKEN_STEPS)))
    app, reply = ingress_app(tmp_path, open_stream=lambda _: engine), Reply()

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def watch(message: Message) -> None:
            reply.status = message.get("status", reply.status)
            reply.body += message.get("body", b"")
            if reply.body == b": keep-alive\n\n" * 3:
                engine.may_start.set()

        await app(scope, receive, watch)

    asyncio.run(asyncio.wait_for(post_json(watched, "/v1/completions", BODY), 20))
    assert reply.status == 200
    (event,) = reply.events
    assert "error" in event if fails else event["choices"][0]["text"] == "A"


def test_a_stream_that_is_refused_at_once_has_the_status_of_its_error(tmp_path: Path) -> None:
    engine = Engine(RejectedRequest("prompt: too long"), at_once=True)
    app = ingress_app(tmp_path, open_stream=lambda _: engine)
    assert asyncio.run(post_json(app, "/v1/completions", BODY)).status == 400


def test_a_request_ends_when_its_client_leaves_before_an_engine_takes_it(tmp_path: Path) -> None:
    engine = Engine()
    app = ingress_app(tmp_path, open_stream=lambda _: engine)

    async def run() -> None:
        client = asyncio.ensure_future(post_json(app, "/v1/completions", BODY))
        await asyncio.sleep(0.05)
        client.cancel()
        await asyncio.wait_for(engine.cancelled.wait(), 5)

    asyncio.run(run())
