"""Limits on HTTP requests, checked before anything is parsed: host, key, size, duration, concurrency."""

from __future__ import annotations

import asyncio
import re
from time import perf_counter
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import RequestLimits
from serving.ingress.api_keys import ApiKeys
from serving.ingress.hosts import AllowedHosts
from serving.observability.log import log
from serving.observability.metrics import IngressMetrics
from serving.protocol.errors import ErrorInfo, RequestError, error_response, overloaded_error

# Pages use Basic authentication, the only kind for which a browser prompts its user.
_PAGES = re.compile(r"/(web/.*)?")
_HEALTH = "/health"
_GENERATION = re.compile(r"/v1/(completions|chat/completions|responses|branches|score)")


class RequestLimitsMiddleware:
    """ASGI middleware that admits requests to an application, bounds their messages and counts them."""

    def __init__(
        self,
        app: ASGIApp,
        limits: RequestLimits,
        keys: ApiKeys,
        hosts: AllowedHosts,
        metrics: IngressMetrics,
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._keys, self._hosts = keys, hosts
        self._open_generations = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._handle_http(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _handle_http(self, scope: Scope, receive: Receive, send: Send) -> None:
        bounded_send = _BoundedSend(send, self._limits.slow_client_s)
        try:
            self._admit(scope)
        except RequestError as error:
            self._count(scope, error.status_code)
            response = error_response(error.status_code, error.info, dict(error.headers or {}))
            await response(scope, receive, bounded_send)
        else:
            await self._forward(scope, _BoundedReceive(receive, self._limits), bounded_send)

    def _admit(self, scope: Scope) -> None:
        """Raise RequestError for a request that is not served."""
        path, headers = _route_path(scope), Headers(scope=scope)
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
        if size > self._limits.max_header_bytes:
            message = f"headers: {size} bytes, {self._limits.max_header_bytes} allowed; send fewer"
            raise self._rejection("headers", 431, message)
        host = headers.get("host")
        if host is not None and path != _HEALTH and host not in self._hosts:
            message = f"host={host[:80]!r}: not the name of this server; add it to allowed_hosts"
            raise self._rejection("host", 421, message)
        if path != _HEALTH and not self._keys.is_valid(headers.get("authorization")):
            challenge = 'Basic realm="parallelmind"' if _PAGES.fullmatch(path) else "Bearer"
            message = "no valid API key; send it as Authorization: Bearer KEY"
            raise self._rejection("key", 401, message, {"www-authenticate": challenge})
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._limits.max_body_bytes:
            raise self._rejection("body", 413, _body_too_large(self._limits))
        if _is_generation(scope) and self._open_generations >= self._limits.max_requests:
            self._metrics.rejected.labels("busy").inc()
            raise overloaded_error()

    def _rejection(
        self, reason: str, status: int, message: str, headers: dict[str, str] | None = None
    ) -> RequestError:
        self._metrics.rejected.labels(reason).inc()
        code = {401: "invalid_api_key", 421: "unknown_host"}.get(status, "too_large")
        return RequestError(status, ErrorInfo(message=message, code=code), headers)

    async def _forward(self, scope: Scope, receive: _BoundedReceive, send: _BoundedSend) -> None:
        is_generation, started_at = _is_generation(scope), perf_counter()
        self._open_generations += is_generation
        self._metrics.open_requests.inc()
        try:
            await self._app(scope, receive, send)
        except RequestError as error:
            await error_response(error.status_code, error.info)(scope, receive, send)
        except Exception:
            if not send.timed_out:
                raise
            log.warning("the client does not read its response; connection dropped")
        finally:
            self._open_generations -= is_generation
            self._metrics.open_requests.dec()
            self._count(scope, send.status)
            path = quote(scope["path"])  # a line break in a path must not forge a log line
            log.info("%s %s %d %.3f s", scope["method"], path, send.status, perf_counter() - started_at)

    def _count(self, scope: Scope, status: int) -> None:
        path = _route_path(scope)
        route = path if _is_generation(scope) or path == _HEALTH else "other"
        self._metrics.requests.labels(route, str(status)).inc()


def _route_path(scope: Scope) -> str:
    """The path below Serve's route_prefix."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _is_generation(scope: Scope) -> bool:
    """Whether the request needs an engine's steps. Only these count towards max_requests."""
    return scope["method"] == "POST" and _GENERATION.fullmatch(_route_path(scope)) is not None


def _body_too_large(limits: RequestLimits) -> str:
    return f"body: more than the {limits.max_body_bytes} bytes allowed; send several requests"


class _BoundedReceive:
    """ASGI receive that raises RequestError for a body that is too long or too late."""

    def __init__(self, receive: Receive, limits: RequestLimits) -> None:
        self._receive, self._limits = receive, limits
        self._deadline = asyncio.get_running_loop().time() + limits.slow_client_s
        self._size, self._complete = 0, False

    async def __call__(self) -> Message:
        if self._complete:  # the caller waits for the disconnect
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            info = ErrorInfo(message="body: did not arrive in time; send it at once", code="timeout")
            raise RequestError(408, info) from None
        self._size += len(message.get("body", b""))
        if self._size > self._limits.max_body_bytes:
            raise RequestError(413, ErrorInfo(message=_body_too_large(self._limits), code="too_large"))
        self._complete = not message.get("more_body", False)
        return message


class _BoundedSend:
    """ASGI send that raises _ClientTimeoutError for a client that does not read.

    status: of the response; 499 if the client left before it.
    """

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send, self._timeout_s = send, timeout_s
        self.status = 499
        self.timed_out = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except TimeoutError:
            self.timed_out = True
            raise _ClientTimeoutError from None


class _ClientTimeoutError(Exception):
    """The client does not read its response."""
