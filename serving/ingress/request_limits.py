"""What every request passes before anything else looks at it: identity, size, and whether there is room."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import re
import secrets
from collections.abc import Sequence
from hashlib import sha256
from time import perf_counter
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import Limits
from serving.observability.log import log, request_id
from serving.observability.metrics import IngressMetrics
from serving.protocol.errors import RequestError, answer, busy
from serving.protocol.openai import ErrorInfo

_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_PAGES = re.compile(
    r"/(web/.*)?"
)  # a browser can only ask its user for a key there, and then sends it everywhere
_OPEN = "/health"
_WORKING = re.compile(r"/v1/(completions|chat/completions|branches)")


class ApiKeys:
    """Which API keys are known; none at all lets everybody in. Only hashes are kept."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._known = [sha256(key.encode()).digest() for key in keys]

    def admits(self, authorization: str | None) -> bool:
        """The value of an Authorization header: Bearer, or Basic with the key as password. In time that tells
        nothing of keys.
        """
        if not self._known:
            return True
        given = sha256(_key_of(authorization or "")).digest()
        return sum([hmac.compare_digest(given, known) for known in self._known]) > 0


def _key_of(authorization: str) -> bytes:
    """A header's text is its bytes as Latin-1."""
    scheme, _, value = authorization.partition(" ")
    given = value.strip().encode("latin-1")
    if scheme.lower() != "basic":
        return given if scheme.lower() == "bearer" else b""
    try:
        return base64.b64decode(given, validate=True).partition(b":")[2]
    except binascii.Error:
        return b""


class RequestLimitsMiddleware:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, limits: Limits, keys: ApiKeys, meters: IngressMetrics) -> None:
        self._app, self._limits, self._keys, self._meters = app, limits, keys, meters
        self._working = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id.set(given if _ID.fullmatch(given) else secrets.token_hex(8))
        out = _Out(send, request_id.get(), self._limits.slow_client_s)
        try:
            self._admit(scope, headers)
        except RequestError as error:
            self._count(scope, error.status_code)
            await answer(error.status_code, error.problem, dict(error.headers or {}))(
                scope, receive, out.send
            )
        else:
            await self._pass(scope, _In(receive, self._limits), out)

    async def _pass(self, scope: Scope, body: _In, out: _Out) -> None:
        works, began = self._works(scope), perf_counter()
        self._working += works
        self._meters.open.inc()
        try:
            await self._app(scope, body.receive, out.send)
        except RequestError as error:
            await answer(error.status_code, error.problem)(scope, body.receive, out.send)
        except Exception:
            if not out.gone:
                raise
            log.warning("the client reads nothing and is left")
        finally:
            self._working -= works
            self._meters.open.dec()
            self._count(scope, out.status)
            path = quote(scope["path"])  # or whoever asks would write lines of the log
            log.info("%s %s %d %.3f s", scope["method"], path, out.status, perf_counter() - began)

    def _admit(self, scope: Scope, headers: Headers) -> None:
        """Raises RequestError for whoever may not go on."""
        path = _path(scope)
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self._limits.max_header_bytes:
            raise self._turned_away(
                "headers", 431, f"headers: {size} bytes, {self._limits.max_header_bytes} allowed; send fewer"
            )
        if path != _OPEN and not self._keys.admits(headers.get("authorization")):
            ask = {"www-authenticate": 'Basic realm="parallelmind"' if _PAGES.fullmatch(path) else "Bearer"}
            raise self._turned_away("key", 401, "no valid API key; send it as Authorization: Bearer KEY", ask)
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._limits.max_body_bytes:
            raise self._turned_away("body", 413, _too_long(self._limits))
        if self._works(scope) and self._working >= self._limits.max_requests:
            self._meters.refused.labels("busy").inc()
            raise busy()

    def _turned_away(
        self, reason: str, status: int, message: str, headers: dict[str, str] | None = None
    ) -> RequestError:
        self._meters.refused.labels(reason).inc()
        code = "invalid_api_key" if status == 401 else "too_large"
        return RequestError(status, ErrorInfo(message=message, code=code), headers)

    @staticmethod
    def _works(scope: Scope) -> bool:
        return scope["method"] == "POST" and _WORKING.fullmatch(_path(scope)) is not None

    def _count(self, scope: Scope, status: int) -> None:
        path = _path(scope)
        self._meters.requests.labels(
            path if self._works(scope) or path == _OPEN else "other", str(status)
        ).inc()


def _path(scope: Scope) -> str:
    """As the routes know it: below Serve's route_prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _too_long(limits: Limits) -> str:
    return f"body: more than the {limits.max_body_bytes} bytes allowed; send several requests"


class _In:
    """A request's body: no longer than allowed, and in time."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._until = asyncio.get_running_loop().time() + limits.slow_client_s
        self._size, self._whole = 0, False

    async def receive(self) -> Message:
        if self._whole:  # now it is a disconnect that is waited for
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            problem = ErrorInfo(message="body: did not come in time; send it at once", code="timeout")
            raise RequestError(408, problem) from None
        self._size += len(message.get("body", b""))
        if self._size > self._limits.max_body_bytes:
            raise RequestError(413, ErrorInfo(message=_too_long(self._limits), code="too_large"))
        self._whole = not message.get("more_body", False)
        return message


class _Out:
    """An answer: it names its request, and does not wait for a client who reads nothing."""

    def __init__(self, send: Send, name: str, patience_s: float) -> None:
        self._send, self._name, self._patience_s = send, name, patience_s
        self.status = 499  # the client left before any
        self.gone = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)["x-request-id"] = self._name
        try:
            async with asyncio.timeout(self._patience_s):
                await self._send(message)
        except TimeoutError:
            self.gone = True
            raise _GoneError from None


class _GoneError(Exception):
    """Whoever asked does not read the answer."""
