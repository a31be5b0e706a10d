"""Before anything else looks at a request, it is known who asks, how much, and whether there is room."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from asgi import TOLD, App, Reply, ask, counted, front
from starlette.types import Message, Receive, Scope, Send

from serving.config import Limits
from serving.ingress.request_limits import ApiKeys, RequestLimitsMiddleware
from serving.observability.metrics import IngressMetrics

WORK = "/v1/completions"
LIMITS = Limits(max_requests=2, max_body_bytes=1024, max_header_bytes=1024, slow_client_s=0.05)
UNKNOWN = "|one|Bearer|Bearer |Bearer three|Bearer on|Bearer one two|Bearer one,two|Bearer onë|Token one|Basic|Basic one|Basic !!"


def gate(app: Any = None, keys: list[str] | None = None) -> tuple[RequestLimitsMiddleware, IngressMetrics]:
    meters = IngressMetrics()
    return RequestLimitsMiddleware(app or App(), LIMITS, ApiKeys(keys or []), meters), meters


def asked(*args: Any, app: Any = None, keys: list[str] | None = None, **kwargs: Any) -> Reply:
    return asyncio.run(ask(gate(app, keys)[0], *args, **kwargs))


def basic(text: str) -> str:
    return "Basic " + b64encode(text.encode()).decode()


KNOWN = [
    "Bearer one",
    "bearer two",
    "Bearer  one ",
    "BASIC" + basic("me:one")[5:],
    basic(":two"),
    basic("me:with:colons"),
]


@pytest.mark.parametrize("value", KNOWN)
def test_every_known_key_is_let_in(value: str) -> None:
    assert asked(headers={"authorization": value}, keys=["one", "two", "with:colons"]).status == 200


@pytest.mark.parametrize("value", [None, *UNKNOWN.split("|"), basic("one"), basic("one:"), basic("me:three")])
def test_nobody_else_is_let_in(value: str | None) -> None:
    app = App()
    reply = asked(headers={} if value is None else {"authorization": value}, keys=["one", "two"], app=app)
    assert (reply.status, reply.error["code"], app.called) == (401, "invalid_api_key", 0)
    assert "one" not in reply.error["message"]


def test_a_password_that_is_no_base64_at_all_is_refused_as_any_other() -> None:
    assert asked(headers={"authorization": "Basic ü"}, keys=["one"]).status == 401


@pytest.mark.parametrize(
    "path", ["/", "/web/page.js", "/v1/models", WORK, "/metrics", "/health/", "/healthy", "/openapi.json"]
)
def test_who_has_no_key_is_told_how_to_give_one(path: str) -> None:
    reply = asked("GET", path, keys=["one"])
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == (
        'Basic realm="parallelmind"' if path in ("/", "/web/page.js") else "Bearer"
    )


def test_health_needs_no_key_and_where_there_are_none_nothing_does() -> None:
    assert asked("GET", "/health", keys=["one"]).status == 200
    assert asked().status == asked(headers={"authorization": "Bearer whatever"}).status == 200


def test_headers_are_only_so_long() -> None:
    app, most = App(), LIMITS.max_header_bytes - len("x-long") - 4
    assert asked(headers={"x-long": "x" * most}).status == 200
    reply = asked(headers={"x-long": "x" * (most + 1)}, keys=["one"], app=app)
    assert (reply.status, reply.error["code"], app.called) == (431, "too_large", 0)
    assert "1025 bytes, 1024 allowed" in reply.error["message"]


@pytest.mark.parametrize("length", ["1025", "9" * 30])
def test_a_body_that_says_it_is_too_long_is_not_read(length: str) -> None:
    app = App()
    reply = asked("POST", WORK, {"content-length": length}, app=app)
    assert (reply.status, reply.error["code"], app.called) == (413, "too_large", 0)
    assert "1024" in reply.error["message"]


def test_a_body_that_grows_too_long_is_refused_while_it_comes() -> None:
    assert asked("POST", WORK, {"content-length": "1024"}, body=[b"x" * 512, b"x" * 512]).body == b"1024"
    reply = asked("POST", WORK, body=[b"x" * 512, b"x" * 512, b"x"], whole=False)
    assert (reply.status, reply.error["code"]) == (413, "too_large")
    assert (
        asked("POST", WORK, {"content-length": "5"}, body=[b"x" * 2000]).status == 413
    )  # and nobody believes its length


@pytest.mark.parametrize("chunks", [[], [b"begun"]])
def test_a_body_that_does_not_come_is_not_waited_for(chunks: list[bytes]) -> None:
    served, meters = gate()
    reply = asyncio.run(asyncio.wait_for(ask(served, "POST", WORK, body=chunks, whole=False), 5))
    assert (reply.status, reply.error["code"]) == (408, "timeout")
    assert counted(meters, "requests_total", route=WORK, status="408") == 1
    assert counted(meters, "open_requests") == 0


def test_who_has_sent_a_body_may_wait_for_its_answer_as_long_as_it_takes() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        with suppress(TimeoutError):
            await asyncio.wait_for(
                receive(), 3 * LIMITS.slow_client_s
            )  # as a stream listens for the client's leaving
        await App()(scope, lambda: asyncio.sleep(0, {}), send)

    assert asked("POST", WORK, app=app).status == 200


async def opened(served: RequestLimitsMiddleware, app: App, path: str = WORK) -> asyncio.Task[Reply]:
    """A request that is going on."""
    app.entered.clear()
    app.may_end.clear()
    task = asyncio.create_task(ask(served, "POST", path))
    await asyncio.wait_for(app.entered.wait(), 5)
    return task


def test_one_request_too_many_is_told_so_at_once_and_what_is_no_work_is_answered() -> None:
    async def play() -> None:
        app = App()
        served, meters = gate(app)
        tasks = [await opened(served, app, path) for path in ("/v1/chat/completions", "/v1/branches")]
        assert counted(meters, "open_requests") == 2
        reply = await asyncio.wait_for(ask(served, "POST", WORK), 1)
        assert (reply.status, reply.headers["retry-after"], reply.error["code"]) == (429, "1", "overloaded")
        assert (app.called, counted(meters, "refused_total", reason="busy")) == (2, 1)
        tasks += [
            asyncio.create_task(ask(served, method, path))
            for method, path in (("GET", "/health"), ("DELETE", WORK))
        ]
        await asyncio.sleep(0)
        app.may_end.set()
        assert [(await task).status for task in tasks] == [200] * 4
        assert (await ask(served, "POST", WORK)).status == 200
        assert counted(meters, "open_requests") == 0

    asyncio.run(play())


@pytest.mark.parametrize("end", ["fails", "is cancelled", "is too long", "is not read"])
def test_a_request_leaves_its_place_however_it_ends(end: str) -> None:
    async def play() -> None:
        app = App()
        served, meters = gate(app)
        for _ in range(2 * LIMITS.max_requests):
            if end == "is too long":
                await ask(served, "POST", WORK, body=[b"x" * 2000])
            elif end == "is not read":
                await asyncio.wait_for(ask(served, "POST", WORK, reads=1), 5)
            else:
                task = await opened(served, app)
                app.failure = RuntimeError(end) if end == "fails" else None
                app.may_end.set() if end == "fails" else task.cancel()
                with suppress(RuntimeError, asyncio.CancelledError):
                    await task
        app.failure = None
        app.may_end.set()
        assert counted(meters, "open_requests") == 0
        assert counted(meters, "refused_total") == 0
        assert [
            reply.status for reply in await asyncio.gather(*(ask(served, "POST", WORK) for _ in range(2)))
        ] == [200, 200]

    asyncio.run(play())


@pytest.mark.parametrize("name", ["a", "Req-1.b_C", "x" * 64])
def test_a_request_keeps_the_name_it_brings(name: str) -> None:
    for keys, length in (([], "0"), (["one"], "0"), ([], "9999")):
        reply = asked("POST", WORK, {"x-request-id": name, "content-length": length}, keys=keys)
        assert reply.headers["x-request-id"] == name


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a\nb", "a\n", "ü", "<b>", "a/b"])
def test_a_name_that_is_no_name_is_replaced(name: str) -> None:
    first, second = (asked(headers={"x-request-id": name}).headers["x-request-id"] for _ in range(2))
    assert first.isalnum()
    assert first not in (name, second)


def test_websockets_are_closed_and_the_rest_is_passed_on() -> None:
    async def play() -> None:
        seen: list[Any] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.append(scope["type"])

        async def send(message: Message) -> None:
            seen.append(message)

        served, _ = gate(app, keys=["one"])
        for kind in ("websocket", "lifespan"):
            await served({"type": kind, "path": "/", "headers": []}, lambda: asyncio.Future(), send)
        assert seen == [{"type": "websocket.close", "code": 1008}, "lifespan"]

    asyncio.run(play())


def test_answers_and_refusals_are_counted_by_route_status_and_reason() -> None:
    async def play() -> None:
        served, meters = gate(keys=["one"])
        known = {"authorization": "Bearer one"}
        for path, headers in ((WORK, known), (WORK, known), (WORK, {}), ("/made/up", known), ("/health", {})):
            await ask(served, "POST", path, headers)
        await ask(served, "POST", WORK, {**known, "content-length": "2000"})
        await ask(served, "POST", WORK, {"x-long": "x" * 2000})
        for route, status, times in [
            (WORK, "200", 2),
            (WORK, "401", 1),
            (WORK, "413", 1),
            (WORK, "431", 1),
            ("other", "200", 1),
        ]:
            assert counted(meters, "requests_total", route=route, status=status) == times
        assert counted(meters, "requests_total", route="/health") == 1
        assert [
            counted(meters, "refused_total", reason=reason) for reason in ("key", "body", "headers", "busy")
        ] == [1, 1, 1, 0]

    asyncio.run(play())


JSON = {"content-type": "application/json"}


def routed(folder: Path, *args: Any, **kwargs: Any) -> Reply:
    """What the real routes answer behind their gate."""
    app = front(
        folder, TOLD, max_body_bytes=1024, slow_client_s=0.05, cors_origins=["http://page"]
    ).__serve_build_asgi_app__()
    return asyncio.run(asyncio.wait_for(ask(app, *args, **kwargs), 5))


@pytest.mark.parametrize(
    ("rest", "status", "code"), [([b" " * 1024], 413, "too_large"), ([], 408, "timeout")]
)
def test_real_routes_let_the_word_of_the_gate_stand(
    tmp_path: Path, rest: list[bytes], status: int, code: str
) -> None:
    reply = routed(tmp_path, "POST", WORK, JSON, [b'{"model": ', *rest], whole=False)
    assert (reply.status, reply.error["code"]) == (status, code)


@pytest.mark.parametrize("stream", ["true", "false"])
def test_who_does_not_read_a_real_answer_is_left_without_any_error(tmp_path: Path, stream: str) -> None:
    body = [b'{"model": "tiny", "prompt": "who", "stream": %s}' % stream.encode()]
    assert routed(tmp_path, "POST", WORK, JSON, body).body.endswith(
        b"[DONE]\n\n" if stream == "true" else b"}"
    )
    assert routed(tmp_path, "POST", WORK, JSON, body, reads=1).status == 200


def test_a_browser_that_asks_whether_it_may_call_needs_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never sends one with that question, so that a page elsewhere could not call at all."""
    monkeypatch.setenv("PARALLELMIND_API_KEYS", "one")
    origin = {"origin": "http://page", "access-control-request-headers": "authorization"}
    reply = routed(tmp_path, "OPTIONS", WORK, {**origin, "access-control-request-method": "POST"})
    assert (reply.status, reply.headers.get("access-control-allow-origin")) == (200, "http://page")
    assert routed(tmp_path, "POST", WORK, {**origin, **JSON}).status == 401
