"""Errors in OpenAI's format, with the HTTP statuses that its clients expect."""

from __future__ import annotations

import json
import re
from typing import Any

from fastapi import HTTPException
from fastapi.responses import Response
from pydantic import BaseModel

from serving.engine.messages import RejectedRequest


class ErrorInfo(BaseModel):
    """What went wrong. param: the request's field that caused it, if one did."""

    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorInfo


_FIELD = re.compile(r"([a-z_]\w*(?:\[\d+\])?(?:\.\w+)?)[=:]")
_LIBRARY_NAME = re.compile(r"\bmax_new_tokens\b")  # the library's name of max_tokens
_MAX_SHOWN_CHARS = 80  # of a wrong value

INTERNAL_ERROR = ErrorInfo(
    message="internal server error; the server's log has the details",
    type="server_error",
    code="internal_error",
)
ENGINE_LOST = ErrorInfo(
    message="the engine was lost and no other could resume the request; try again",
    type="server_error",
    code="engine_lost",
)
TIMED_OUT = ErrorInfo(
    message="the request took longer than the server allows; ask for fewer tokens",
    type="server_error",
    code="timeout",
)
OVERLOADED = ErrorInfo(
    message="the server is overloaded; try again later", type="rate_limit_error", code="overloaded"
)


class RequestError(HTTPException):
    """A request that is answered with this status and error.

    An HTTPException, since FastAPI replaces other exceptions that are raised while it reads a body.
    """

    def __init__(self, status: int, info: ErrorInfo, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, info.message, headers)
        self.info = info


def decoding_error(message: str) -> RequestError:
    """The error of a branch that ended with an error."""
    info = ErrorInfo(message=message, type="server_error", code="decoding_failed")
    return RequestError(500, info)


class EngineLostError(Exception):
    """The engine of a sample is gone, and no other engine could resume the sample."""


def overloaded_error(message: str = OVERLOADED.message) -> RequestError:
    return RequestError(429, OVERLOADED.model_copy(update={"message": message}), {"retry-after": "1"})


def user_error(message: str, status: int = 400) -> RequestError:
    """The error of a UserError, whose message begins with `field=value` or `field:` if a field caused it."""
    message = _LIBRARY_NAME.sub("max_tokens", message)
    field = _FIELD.match(message)
    if status == 400 and field and field[1] == "model":
        return RequestError(404, ErrorInfo(message=message, param="model", code="model_not_found"))
    if status == 429:
        return overloaded_error(message)
    if status == 503:
        return RequestError(503, ENGINE_LOST.model_copy(update={"message": message}), {"retry-after": "1"})
    info = ErrorInfo(message=message, param=field[1] if field else None, code="invalid_value")
    return RequestError(status, info)


def rejection_error(rejected: RejectedRequest) -> RequestError:
    return user_error(rejected.message, rejected.status)


def error_info(error: BaseException) -> ErrorInfo:
    """The error of an exception inside a stream, whose status has been sent already."""
    if isinstance(error, RequestError):
        return error.info
    if isinstance(error, EngineLostError):
        return ENGINE_LOST
    return TIMED_OUT if isinstance(error, TimeoutError) else INTERNAL_ERROR


def error_response(status: int, info: ErrorInfo, headers: dict[str, str] | None = None) -> Response:
    """The error as a response. ASCII, since it may quote client text that UTF-8 cannot encode."""
    body = json.dumps(ErrorBody(error=info).model_dump(), separators=(",", ":"))
    return Response(body, status, headers, "application/json")


def validation_error_info(error: dict[str, Any]) -> ErrorInfo:
    """The error of one of FastAPI's validation errors, whose `loc` is ("body", field, …)."""
    if error["type"] == "json_invalid":
        return ErrorInfo(message=f"invalid JSON: {error['ctx']['error']}", code="invalid_json")
    field = _field_name(error["loc"])
    if not field:
        return ErrorInfo(
            message="the body is empty or not a JSON object; send one as application/json",
            code="invalid_json",
        )
    if error["type"] == "extra_forbidden":
        return ErrorInfo(message=f"{field}: unknown field; remove it", param=field, code="unknown_parameter")
    if error["type"] == "missing":
        return ErrorInfo(
            message=f"{field}: required and not given; add it", param=field, code="missing_required_parameter"
        )
    value = repr(error["input"])
    value = value if len(value) <= _MAX_SHOWN_CHARS else f"{value[:_MAX_SHOWN_CHARS]}…"
    remedy = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return ErrorInfo(message=f"{field}={value}: {remedy}", param=field, code="invalid_value")


def _field_name(location: tuple[Any, ...]) -> str:
    """`branches[1].text` for ("body", "branches", 1, "text"), without the names of types."""
    parts = [str(part) for part in location[1:] if "[" not in str(part) and part not in ("str", "int")]
    return re.sub(r"\.(\d+)\b", r"[\1]", ".".join(parts))
