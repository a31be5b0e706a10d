"""FastAPI exception handlers: every failure is answered in OpenAI's error format."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from serving.protocol.errors import (
    ENGINE_LOST,
    INTERNAL_ERROR,
    TIMED_OUT,
    EngineLostError,
    ErrorInfo,
    RequestError,
    error_response,
    validation_error_info,
)

_MAX_SHOWN_CHARS = 80  # of a path


def install_error_handlers(app: FastAPI) -> None:
    app.exception_handler(RequestError)(_request_error)
    app.exception_handler(RequestValidationError)(_validation_error)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(EngineLostError)(_engine_lost)
    app.exception_handler(TimeoutError)(_timed_out)
    app.exception_handler(Exception)(_internal_error)


def _request_error(_: Request, error: RequestError) -> Response:
    return error_response(error.status_code, error.info, dict(error.headers or {}))


def _validation_error(_: Request, error: RequestValidationError) -> Response:
    return error_response(400, validation_error_info(error.errors()))


def _http_error(request: Request, error: HTTPException) -> Response:
    headers, target = dict(error.headers or {}), f"{request.method} {request.url.path[:_MAX_SHOWN_CHARS]}"
    if error.status_code == 404:
        routes = ", ".join(_served_routes(request))
        info = ErrorInfo(message=f"{target}: no such route; served are {routes}", code="unknown_route")
        return error_response(404, info, headers)
    if error.status_code == 405:
        info = ErrorInfo(message=f"{target}: no such method; use {headers.get('Allow', 'another one')}")
        return error_response(405, info, headers)
    return error_response(error.status_code, ErrorInfo(message=str(error.detail)), headers)


def _served_routes(request: Request) -> list[str]:
    return [
        f"{method} {route.path}"
        for route in request.app.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in sorted(route.methods or ())
    ]


def _engine_lost(_: Request, __: EngineLostError) -> Response:
    return error_response(503, ENGINE_LOST, {"retry-after": "1"})


def _timed_out(_: Request, __: TimeoutError) -> Response:
    return error_response(504, TIMED_OUT)


def _internal_error(_: Request, __: Exception) -> Response:
    return error_response(500, INTERNAL_ERROR)
