"""Keys, sizes and the number of requests are checked before anything is parsed."""

from __future__ import annotations

import asyncio
import socket
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from asgi import ONE_TOKEN_STEPS, Reply, StubApp, ingress_app, metric_value, send_request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import RequestLimits
from serving.ingress.api_keys import ApiKeys
from serving.ingress.hosts import AllowedHosts
from serving.ingress.request_id import with_request_id
from serving.ingress.request_limits import RequestLimitsMiddleware
from serving.observability.metrics import IngressMetrics

ROUTE = "/v1/completions"
LIMITS = RequestLimits(max_requests=2, max_body_bytes=1024, max_header_bytes=1024, slow_client_s=0.05)
UNKNOWN_AUTHORIZATIONS = [
    "",
    "one",
    "Bearer",
    "Bearer ",
    "Bearer three",
    "Bearer on",
    "Bearer one two",
    "Bearer one,two",
    "Bearer onë",
    "Token one",
    "Basic",
    "Basic one",
    "Basic !!",
]


def limited(
    app: Any = None, keys: list[str] | None = None, hosts: Sequence[str] = ()
) -> tuple[ASGIApp, IngressMetrics]:
    """A stub application behind the limits, as the ingress builds it."""
    metrics, allowed = IngressMetrics(), AllowedHosts(hosts)
    middleware = RequestLimitsMiddleware(app or StubApp(), LIMITS, ApiKeys(keys or []), allowed, metrics)
    return with_request_id(middleware), metrics


def send(*args: Any, app: Any = None, keys: list[str] | None = None, **kwargs: Any) -> Reply:
    return asyncio.run(send_request(limited(app, keys)[0], *args, **kwargs))


def basic(text: str) -> str:
    return "Basic " + b64encode(text.encode()).decode()


KNOWN_AUTHORIZATIONS = [
    "Bearer one",
    "bearer two",
    "Bearer  one ",
    "BASIC" + basic("me:one")[5:],
    basic(":two"),
    basic("me:with:colons"),
]


@pytest.mark.parametrize("value", KNOWN_AUTHORIZATIONS)
def test_a_known_key_is_valid(value: str) -> None:
    assert send(headers={"authorization": value}, keys=["one", "two", "with:colons"]).status == 200


@pytest.mark.parametrize(
    "value", [None, *UNKNOWN_AUTHORIZATIONS, basic("one"), basic("one:"), basic("me:three")]
)
def test_any_other_authorization_is_rejected(value: str | None) -> None:
    app = StubApp()
    reply = send(headers={} if value is None else {"authorization": value}, keys=["one", "two"], app=app)
    assert (reply.status, reply.error["code"], app.called) == (401, "invalid_api_key", 0)
    assert "one" not in reply.error["message"]


def test_a_password_that_is_not_base64_is_rejected() -> None:
    assert send(headers={"authorization": "Basic ü"}, keys=["one"]).status == 401


@pytest.mark.parametrize(
    "path", ["/", "/web/page.js", "/v1/models", ROUTE, "/metrics", "/health/", "/healthy", "/openapi.json"]
)
def test_a_rejection_says_how_to_send_a_key(path: str) -> None:
    reply = send("GET", path, keys=["one"])
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == (
        'Basic realm="parallelmind"' if path in ("/", "/web/page.js") else "Bearer"
    )


def test_health_needs_no_key_and_without_keys_no_route_does() -> None:
    assert send("GET", "/health", keys=["one"]).status == 200
    assert send().status == send(headers={"authorization": "Bearer whatever"}).status == 200


def test_headers_that_are_too_long_are_rejected() -> None:
    app, longest = StubApp(), LIMITS.max_header_bytes - len("x-long") - 4
    assert send(headers={"x-long": "x" * longest}).status == 200
    reply = send(headers={"x-long": "x" * (longest + 1)}, keys=["one"], app=app)
    assert (reply.status, reply.error["code"], app.called) == (431, "too_large", 0)
    assert "1025 bytes, 1024 allowed" in reply.error["message"]


@pytest.mark.parametrize("length", ["1025", "9" * 30])
def test_a_content_length_that_is_too_long_is_rejected_unread(length: str) -> None:
    app = StubApp()
    reply = send("POST", ROUTE, {"content-length": length}, app=app)
    assert (reply.status, reply.error["code"], app.called) == (413, "too_large", 0)
    assert "1024" in reply.error["message"]


def test_a_body_that_becomes_too_long_is_rejected_while_it_arrives() -> None:
    assert send("POST", ROUTE, {"content-length": "1024"}, body=[b"x" * 512, b"x" * 512]).body == b"1024"
    reply = send("POST", ROUTE, body=[b"x" * 512, b"x" * 512, b"x"], whole=False)
    assert (reply.status, reply.error["code"]) == (413, "too_large")
    understated = send("POST", ROUTE, {"content-length": "5"}, body=[b"x" * 2000])
    assert understated.status == 413


@pytest.mark.parametrize("chunks", [[], [b"begun"]])
def test_a_body_that_does_not_arrive_in_time_is_rejected(chunks: list[bytes]) -> None:
    served, metrics = limited()
    reply = asyncio.run(asyncio.wait_for(send_request(served, "POST", ROUTE, body=chunks, whole=False), 5))
    assert (reply.status, reply.error["code"]) == (408, "timeout")
    assert metric_value(metrics, "requests_total", route=ROUTE, status="408") == 1
    assert metric_value(metrics, "open_requests") == 0


def test_the_time_limit_of_the_body_does_not_limit_the_response() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        with suppress(TimeoutError):
            await asyncio.wait_for(
                receive(), 3 * LIMITS.slow_client_s
            )  # as a stream listens for the client's leaving
        await StubApp()(scope, lambda: asyncio.sleep(0, {}), send)

    assert send("POST", ROUTE, app=app).status == 200


async def open_request(served: ASGIApp, app: StubApp, path: str = ROUTE) -> asyncio.Task[Reply]:
    """A request that the application has read and not yet answered."""
    app.entered.clear()
    app.may_end.clear()
    task = asyncio.create_task(send_request(served, "POST", path))
    await asyncio.wait_for(app.entered.wait(), 5)
    return task


def test_one_request_too_many_is_rejected_at_once_and_other_routes_are_served() -> None:
    async def run() -> None:
        app = StubApp()
        served, metrics = limited(app)
        tasks = [await open_request(served, app, path) for path in ("/v1/chat/completions", "/v1/branches")]
        assert metric_value(metrics, "open_requests") == 2
        reply = await asyncio.wait_for(send_request(served, "POST", ROUTE), 1)
        assert (reply.status, reply.headers["retry-after"], reply.error["code"]) == (429, "1", "overloaded")
        assert (app.called, metric_value(metrics, "refused_total", reason="busy")) == (2, 1)
        tasks += [
            asyncio.create_task(send_request(served, method, path))
            for method, path in (("GET", "/health"), ("DELETE", ROUTE))
        ]
        await asyncio.sleep(0)
        app.may_end.set()
        assert [(await task).status for task in tasks] == [200] * 4
        assert (await send_request(served, "POST", ROUTE)).status == 200
        assert metric_value(metrics, "open_requests") == 0

    asyncio.run(run())


@pytest.mark.parametrize("end", ["fails", "is cancelled", "is too long", "is not read"])
def test_a_request_is_no_longer_counted_however_it_ends(end: str) -> None:
    async def run() -> None:
        app = StubApp()
        served, metrics = limited(app)
        for _ in range(2 * LIMITS.max_requests):
            if end == "is too long":
                await send_request(served, "POST", ROUTE, body=[b"x" * 2000])
            elif end == "is not read":
                await asyncio.wait_for(send_request(served, "POST", ROUTE, reads=1), 5)
            else:
                task = await open_request(served, app)
                app.failure = RuntimeError(end) if end == "fails" else None
                app.may_end.set() if end == "fails" else task.cancel()
                with suppress(RuntimeError, asyncio.CancelledError):
                    await task
        app.failure = None
        app.may_end.set()
        assert metric_value(metrics, "open_requests") == 0
        assert metric_value(metrics, "refused_total") == 0
        assert [
            reply.status
            for reply in await asyncio.gather(*(send_request(served, "POST", ROUTE) for _ in range(2)))
        ] == [200, 200]

    asyncio.run(run())


@pytest.mark.parametrize("request_id", ["a", "Req-1.b_C", "x" * 64])
def test_a_valid_request_id_is_kept(request_id: str) -> None:
    for keys, length in (([], "0"), (["one"], "0"), ([], "9999")):
        reply = send("POST", ROUTE, {"x-request-id": request_id, "content-length": length}, keys=keys)
        assert reply.headers["x-request-id"] == request_id


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 65, "a\nb", "a\n", "ü", "<b>", "a/b"])
def test_a_malformed_request_id_is_replaced(request_id: str) -> None:
    first, second = (send(headers={"x-request-id": request_id}).headers["x-request-id"] for _ in range(2))
    assert first.isalnum()
    assert first not in (request_id, second)


def test_websockets_are_closed_and_other_scopes_pass() -> None:
    async def run() -> None:
        seen: list[Any] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope["type"])

        async def send(message: Message) -> None:
            seen.append(message)

        served, _ = limited(app, keys=["one"])
        for kind in ("websocket", "lifespan"):
            await served({"type": kind, "path": "/", "headers": []}, lambda: asyncio.Future(), send)
        assert seen == [{"type": "websocket.close", "code": 1008}, "lifespan"]

    asyncio.run(run())


def test_responses_are_counted_by_route_and_status_and_rejections_by_reason() -> None:
    async def run() -> None:
        served, metrics = limited(keys=["one"])
        known = {"authorization": "Bearer one"}
        for path, headers in (
            (ROUTE, known),
            (ROUTE, known),
            (ROUTE, {}),
            ("/made/up", known),
            ("/health", {}),
        ):
            await send_request(served, "POST", path, headers)
        await send_request(served, "POST", ROUTE, {**known, "content-length": "2000"})
        await send_request(served, "POST", ROUTE, {"x-long": "x" * 2000})
        for route, status, times in [
            (ROUTE, "200", 2),
            (ROUTE, "401", 1),
            (ROUTE, "413", 1),
            (ROUTE, "431", 1),
            ("other", "200", 1),
        ]:
            assert metric_value(metrics, "requests_total", route=route, status=status) == times
        assert metric_value(metrics, "requests_total", route="/health") == 1
        assert [
            metric_value(metrics, "refused_total", reason=reason)
            for reason in ("key", "body", "headers", "busy")
        ] == [1, 1, 1, 0]

    asyncio.run(run())


JSON = {"content-type": "application/json"}


def send_to_routes(folder: Path, *args: Any, **kwargs: Any) -> Reply:
    """Send a request to the real routes behind their limits."""
    app = ingress_app(
        folder, ONE_TOKEN_STEPS, max_body_bytes=1024, slow_client_s=0.05, cors_origins=["http://page"]
    )
    return asyncio.run(asyncio.wait_for(send_request(app, *args, **kwargs), 5))


@pytest.mark.parametrize(
    ("rest", "status", "code"), [([b" " * 1024], 413, "too_large"), ([], 408, "timeout")]
)
def test_routes_keep_the_error_of_the_limits(
    tmp_path: Path, rest: list[bytes], status: int, code: str
) -> None:
    reply = send_to_routes(tmp_path, "POST", ROUTE, JSON, [b'{"model": ', *rest], whole=False)
    assert (reply.status, reply.error["code"]) == (status, code)


@pytest.mark.parametrize("header", ["authorization", "idempotency-key", "x-stainless-lang"])
def test_a_page_of_an_allowed_origin_may_send_any_header(tmp_path: Path, header: str) -> None:
    asked = {"origin": "http://page", "access-control-request-method": "POST"}
    asked["access-control-request-headers"] = header
    reply = send_to_routes(tmp_path, "OPTIONS", ROUTE, asked, [])
    assert reply.status == 200


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_client_that_does_not_read_is_dropped_without_an_error(tmp_path: Path, stream: str) -> None:
    body = [b'{"model": "tiny", "prompt": "who", "stream": %s}' % stream.encode()]
    assert send_to_routes(tmp_path, "POST", ROUTE, JSON, body).body.endswith(
        b"[DONE]\n\n" if stream == "true" else b"}"
    )
    assert send_to_routes(tmp_path, "POST", ROUTE, JSON, body, reads=1).status == 200


def test_a_preflight_request_needs_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Browsers send preflight requests without credentials."""
    monkeypatch.setenv("PARALLELMIND_API_KEYS", "one")
    origin = {"origin": "http://page", "access-control-request-headers": "authorization"}
    reply = send_to_routes(tmp_path, "OPTIONS", ROUTE, {**origin, "access-control-request-method": "POST"})
    assert (reply.status, reply.headers.get("access-control-allow-origin")) == (200, "http://page")
    assert send_to_routes(tmp_path, "POST", ROUTE, {**origin, **JSON}).status == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.0.7:8000", 200),
        (socket.gethostname(), 200),
        ("mind.example.com:8000", 200),
        ("a.b.lab.example.org", 200),
        ("example.org", 421),
        ("lab.example.org", 421),
        ("rebound.example", 421),
        ("localhost.rebound.example", 421),
        ("notmind.example.com", 421),
        ("127.0.0.1.rebound.example", 421),
        ("rebound.example:80@127.0.0.1", 200),
        ("127.0.0.1@rebound.example", 421),
        ("", 421),
        ("[", 421),
    ],
)
def test_a_host_that_is_no_name_of_this_server_is_refused(host: str, status: int) -> None:
    """A page whose name is made to point at this machine sends that name."""
    app, metrics = limited(hosts=["mind.example.com", "*.lab.example.org"])
    reply = asyncio.run(send_request(app, headers={"host": host}))
    assert reply.status == status
    if status == 421:
        assert (reply.error["code"], metric_value(metrics, "refused_total", reason="host")) == (
            "unknown_host",
            1,
        )
        assert asyncio.run(send_request(app, path="/health", headers={"host": host})).status == 200


def test_every_host_is_accepted_with_a_star() -> None:
    app, _ = limited(hosts=["*"])
    assert asyncio.run(send_request(app, headers={"host": "rebound.example"})).status == 200
