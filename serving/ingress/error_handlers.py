"""FastAPI exception handlers: every failure is answered in OpenAI's error format."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
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
    return error_response(400, validation_error_info(error.errors()[0]))


def _http_error(_: Request, error: HTTPException) -> Response:
    return error_response(error.status_code, ErrorInfo(message=str(error.detail)), dict(error.headers or {}))


def _engine_lost(_: Request, __: EngineLostError) -> Response:
    return error_response(503, ENGINE_LOST, {"retry-after": "1"})


def _timed_out(_: Request, __: TimeoutError) -> Response:
    return error_response(504, TIMED_OUT)


def _internal_error(_: Request, __: Exception) -> Response:
    return error_response(500, INTERNAL_ERROR)
