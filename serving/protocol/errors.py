"""Whatever goes wrong in a request leaves as OpenAI's error shape, with the status that its clients
expect.
"""

from __future__ import annotations

import json
import re
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from serving.engine.messages import RejectedRequest
from serving.protocol.openai import ErrorBody, ErrorInfo

_FIELD = re.compile(r"([a-z_]\w*(?:\[\d+\])?(?:\.\w+)?)[=:]")
_OURS = re.compile(r"\bmax_new_tokens\b")  # the library's name for max_tokens
_SHOWN = 80  # characters of a wrong value

FAILED = ErrorInfo(message="the server failed; its log says why", type="server_error", code="internal_error")
LOST = ErrorInfo(
    message="the engine was lost and no other could go on; try again", type="server_error", code="engine_lost"
)
LATE = ErrorInfo(
    message="longer than the server allows; ask for fewer tokens", type="server_error", code="timeout"
)
BUSY = ErrorInfo(
    message="the server is busy; try again a little later", type="rate_limit_error", code="overloaded"
)


class RequestError(HTTPException):
    """A request that is refused with this status and problem; of a kind that FastAPI lets through while it
    reads a body.
    """

    def __init__(self, status: int, problem: ErrorInfo, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, problem.message, headers)
        self.problem = problem


class EngineLostError(Exception):
    """The engine that decoded a sample is gone, and no other could go on with it."""


def install(app: FastAPI) -> None:
    """Answer every kind of failure in one shape."""
    app.exception_handler(RequestError)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(StarletteHTTPException)(_http)
    app.exception_handler(EngineLostError)(_lost)
    app.exception_handler(TimeoutError)(_late)
    app.exception_handler(Exception)(_failed)


def problem_of(error: BaseException) -> ErrorInfo:
    """What to say of an error in the middle of a stream, whose status is out already."""
    if isinstance(error, RequestError):
        return error.problem
    return LOST if isinstance(error, EngineLostError) else LATE if isinstance(error, TimeoutError) else FAILED


def refusal(message: str, status: int = 400) -> RequestError:
    """For a UserError's message, which begins with `field=value` or `field:` if a field is to blame."""
    message = _OURS.sub("max_tokens", message)
    field = _FIELD.match(message)
    if status == 400 and field and field[1] == "model":
        return RequestError(404, ErrorInfo(message=message, param="model", code="model_not_found"))
    if status == 429:
        return busy(message)
    if status == 503:
        return RequestError(503, LOST.model_copy(update={"message": message}), {"retry-after": "1"})
    return RequestError(
        status, ErrorInfo(message=message, param=field[1] if field else None, code="invalid_value")
    )


def refused(given: RejectedRequest) -> RequestError:
    return refusal(given.message, given.status)


def busy(message: str = BUSY.message) -> RequestError:
    return RequestError(429, BUSY.model_copy(update={"message": message}), {"retry-after": "1"})


def answer(status: int, problem: ErrorInfo, headers: dict[str, str] | None = None) -> Response:
    """In ASCII, since what a client has sent, and is told of, need not be encodable."""
    body = json.dumps(ErrorBody(error=problem).model_dump(), separators=(",", ":"))
    return Response(body, status, headers, "application/json")


def _refused(_: Request, error: RequestError) -> Response:
    return answer(error.status_code, error.problem, dict(error.headers or {}))


def _invalid(_: Request, error: RequestValidationError) -> Response:
    return answer(400, _first_problem(error.errors()[0]))


def _http(_: Request, error: StarletteHTTPException) -> Response:
    return answer(error.status_code, ErrorInfo(message=str(error.detail)), dict(error.headers or {}))


def _lost(_: Request, __: EngineLostError) -> Response:
    return answer(503, LOST, {"retry-after": "1"})


def _late(_: Request, __: TimeoutError) -> Response:
    return answer(504, LATE)


def _failed(_: Request, __: Exception) -> Response:
    return answer(500, FAILED)


def _first_problem(found: dict[str, Any]) -> ErrorInfo:
    """One of FastAPI's validation errors. Its place is ("body", field, …)."""
    where = [
        str(part) for part in found["loc"][1:] if "[" not in str(part) and part not in ("str", "int")
    ]  # names of types
    if found["type"] == "json_invalid":
        return ErrorInfo(
            message=f"the body is not JSON ({found['ctx']['error']}); mend it", code="invalid_json"
        )
    if not where:
        return ErrorInfo(
            message="the body is empty or no JSON object; send one, as application/json", code="invalid_json"
        )
    field = re.sub(r"\.(\d+)\b", r"[\1]", ".".join(where))  # branches.1.text is branches[1].text
    if found["type"] == "extra_forbidden":
        return ErrorInfo(
            message=f"{field}: not a field that is served; leave it out",
            param=field,
            code="unknown_parameter",
        )
    if found["type"] == "missing":
        return ErrorInfo(
            message=f"{field}: required and not given; add it", param=field, code="missing_required_parameter"
        )
    shown = repr(found["input"])
    shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
    return ErrorInfo(message=f"{field}={shown}: {_remedy(found['msg'])}", param=field, code="invalid_value")


def _remedy(message: str) -> str:
    return message.removeprefix("Input ").removeprefix("Value error, ")
