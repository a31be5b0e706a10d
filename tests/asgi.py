"""ASGI applications called in-process: a client that may be slow, and a front over an engine that says what
it is told to.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tiny import tiny_tokenizer
from transformers import LlamaConfig

from parallelmind.engine.output import Event
from parallelmind.engine.sampling_params import SamplingParams
from serving.config import AppConfig
from serving.engine.messages import BranchStarted, StepOutput, packed
from serving.ingress.ingress import Ingress
from serving.observability.metrics import Meters

# One branch that says one letter.
TOLD = [
    StepOutput([], [BranchStarted(0, [5], SamplingParams(), (0, 0))]),
    StepOutput([Event(0, "A", 65, "stop")], []),
]


@dataclass
class Reply:
    """What a client has heard so far."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)["error"]
        return found


async def ask(
    app: ASGIApp,
    method: str = "GET",
    path: str = "/v1/models",
    headers: Mapping[str, str] | None = None,
    body: Sequence[bytes] = (b"",),
    *,
    whole: bool = True,
    reads: int | None = None,
    prefix: str = "",
) -> Reply:
    """One request. body: its chunks; whole: whether an end follows them. reads: messages after which the
    client reads no more.

    prefix: of the application, which Serve leaves in the path.
    """
    reply, chunks, heard = Reply(), list(body), 0

    async def receive() -> Message:
        if chunks:
            part = chunks.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(chunks) or not whole}
        return await asyncio.Future()  # the client stays and says nothing

    async def send(message: Message) -> None:
        nonlocal heard
        if reads is not None and heard >= reads:
            await asyncio.Future()
        heard += 1
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            reply.body += message.get("body", b"")

    encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},  # uvicorn's
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": prefix + path,
        "raw_path": (prefix + path).encode(),
        "query_string": b"",
        "root_path": prefix,
        "headers": encoded,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    return reply


async def post(app: ASGIApp, path: str, body: Any, **headers: str) -> Reply:
    text = json.dumps(body).encode()
    return await ask(
        app,
        "POST",
        path,
        {"content-type": "application/json", "content-length": str(len(text)), **headers},
        [text],
    )


class App:
    """An application: reads the body, waits until it may go on, and says how long the body was."""

    def __init__(self) -> None:
        self.called, self.entered, self.may_end = 0, asyncio.Event(), asyncio.Event()
        self.may_end.set()
        self.failure: Exception | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.called += 1
        size, more = 0, True
        while more:
            message = await receive()
            size, more = size + len(message.get("body", b"")), message.get("more_body", False)
        self.entered.set()
        await self.may_end.wait()
        if self.failure:
            raise self.failure
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})


class _Steps:
    """What a handle's streaming call returns."""

    def __init__(self, steps: Sequence[StepOutput]) -> None:
        self._steps = steps

    async def __aiter__(self) -> AsyncIterator[StepOutput]:
        for step in self._steps:
            yield packed(step)

    def cancel(self) -> None:
        """The sample is dropped."""


def counted(meters: Meters, name: str, **labels: str) -> float:
    """The sum over all samples of a meter that have these labels."""
    found = [part for family in meters.families() for part in family.samples]
    return sum(
        value
        for sample, own, value in found
        if sample == f"parallelmind_{name}" and labels.items() <= own.items()
    )


def front(folder: Path, steps: Sequence[StepOutput] = (), **settings: Any) -> Ingress:
    """The process in front as Serve makes it, but for the engine, which answers every sample with these
    steps.
    """
    tiny_tokenizer().save_pretrained(folder)
    LlamaConfig(vocab_size=300, max_position_embeddings=4096).save_pretrained(folder)
    engine: Any = SimpleNamespace(decode=SimpleNamespace(remote=lambda _: _Steps(steps)))
    engine.options = lambda **_: engine
    with patch.multiple(
        "serving.ingress.ingress", keep_on_node_address=lambda: None, set_up=lambda _: None
    ):  # these change the process
        return Ingress(engine, AppConfig.of({"base_model": str(folder), "served_name": "tiny", **settings}))
