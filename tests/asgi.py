"""ASGI applications called in this process: a client that may be slow, and an ingress with a stub engine."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from tiny import tiny_tokenizer
from transformers import LlamaConfig

from parallelmind.engine.output import Event
from serving.config import AppConfig
from serving.engine.messages import BranchStarted, StepOutput, pack_step
from serving.ingress.ingress import Ingress
from serving.observability.metrics import ProcessMetrics

# One branch of one token.
ONE_TOKEN_STEPS = [
    StepOutput([], [BranchStarted(0, (0, 0))]),
    StepOutput([Event(0, "A", 65, "stop")]),
]


@dataclass
class Reply:
    """What a client has received so far."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error

    @property
    def events(self) -> list[Any]:
        """The data of the events of a stream that was read to its end, without the last, [DONE]."""
        *data, end = re.findall(r"^data: (.*)$", self.body.decode(), re.MULTILINE)
        assert end == "[DONE]"
        return [json.loads(text) for text in data]


async def send_request(
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
    """Send one request and return its response.

    body: chunks of the body. whole: whether the body ends after them.
    reads: number of response messages that the client reads; None: all.
    prefix: the application's route prefix, which Serve leaves in the path.
    """
    reply, chunks, received = Reply(), list(body), 0
    path, _, query = path.partition("?")

    async def receive() -> Message:
        if chunks:
            chunk = chunks.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(chunks) or not whole}
        return await asyncio.Future()  # the client stays connected and sends nothing

    async def send(message: Message) -> None:
        nonlocal received
        if reads is not None and received >= reads:
            await asyncio.Future()
        received += 1
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
        "query_string": query.encode(),
        "root_path": prefix,
        "headers": encoded,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)
    return reply


async def post_json(app: ASGIApp, path: str, body: Any, **headers: str) -> Reply:
    text = json.dumps(body).encode()
    return await send_request(
        app,
        "POST",
        path,
        {"content-type": "application/json", "content-length": str(len(text)), **headers},
        [text],
    )


class StubApp:
    """ASGI application that reads the body, waits for `may_end`, and answers with the body's length."""

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


class _StubStream:
    """Stands for the response of a streaming call of a deployment handle."""

    def __init__(self, steps: Sequence[StepOutput]) -> None:
        self._steps = steps

    async def __aiter__(self) -> AsyncIterator[StepOutput]:
        for step in self._steps:
            yield pack_step(step)

    def cancel(self) -> None:
        """Called when the reader closes the stream."""


def metric_value(metrics: ProcessMetrics, name: str, **labels: str) -> float:
    """The sum of all samples of a metric that have these labels."""
    samples = [sample for family in metrics.families() for sample in family.samples]
    return sum(
        value
        for sample_name, sample_labels, value in samples
        if sample_name == f"parallelmind_{name}" and labels.items() <= sample_labels.items()
    )


def _no_replica(*_: Any) -> Any:
    raise DeploymentUnavailableError(DeploymentID("EngineReplica"))


def make_ingress(
    folder: Path, steps: Sequence[StepOutput] = (), open_stream: Any = None, **settings: Any
) -> Ingress:
    """The ingress as Serve builds it, with a stub engine that answers every request with these steps.

    open_stream: in place of the steps, a function from a request to the stream of an engine.
    """
    tiny_tokenizer().save_pretrained(folder)
    LlamaConfig(vocab_size=300, max_position_embeddings=4096).save_pretrained(folder)
    open_stream = open_stream or (lambda _: _StubStream(steps))
    generate = SimpleNamespace(remote=lambda request, _: open_stream(request))
    engine: Any = SimpleNamespace(generate=generate, broadcast=_no_replica)
    engine.options = lambda **_: engine
    config = AppConfig.of({"base_model": str(folder), "served_name": "tiny", **settings})
    # These two change the process.
    with patch.multiple(
        "serving.ingress.ingress",
        bind_replica_port_to_node_address=lambda: None,
        configure_log=lambda _: None,
    ):
        return Ingress(engine, config)


def ingress_app(folder: Path, steps: Sequence[StepOutput] = (), **settings: Any) -> ASGIApp:
    return make_ingress(folder, steps, **settings).__serve_build_asgi_app__()
