"""Whatever goes wrong in a request leaves as OpenAI's error shape, with the status that its clients expect."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serving.schema import ErrorBody, Problem

_FIELD = re.compile(r"(\w+)(?:\[\d+\])?[=:]")
_OURS = {"max_new_tokens": "max_tokens", "branches[": "prompt["}  # the library's name -> OpenAI's

FAILED = Problem(message="the server failed; its log says why", type="server_error", code="internal_error")


class RequestError(Exception):
    """A request that is refused with this status and problem."""

    def __init__(self, status: int, problem: Problem) -> None:
        super().__init__(problem.message)
        self.status, self.problem = status, problem


def install(app: FastAPI) -> None:
    """Answer every kind of failure in one shape."""
    app.exception_handler(RequestError)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_http)
    app.exception_handler(Exception)(_failed)


def refusal(message: str) -> RequestError:
    """The 400 for a UserError's message, which begins with `field=value` or `field:` if a field is to blame."""
    for ours, theirs in _OURS.items():
        message = message.replace(ours, theirs)
    field = _FIELD.match(message)
    return RequestError(400, Problem(message=message, param=field[1] if field else None, code="invalid_value"))


def _answer(status: int, problem: Problem) -> JSONResponse:
    return JSONResponse(ErrorBody(error=problem).model_dump(), status)


def _refused(_: Request, error: RequestError) -> JSONResponse:
    return _answer(error.status, error.problem)


def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    return _answer(400, _first_problem(error.errors()[0]))


def _http(_: Request, error: HTTPException) -> JSONResponse:
    return _answer(error.status_code, Problem(message=str(error.detail)))


def _failed(_: Request, __: Exception) -> JSONResponse:
    return _answer(500, FAILED)


def _first_problem(found: dict[str, Any]) -> Problem:
    """One of FastAPI's validation errors. Its place is ("body", field, …)."""
    where = [str(part) for part in found["loc"][1:]]
    if found["type"] == "json_invalid":
        return Problem(message=f"the body is not JSON: {found['ctx']['error']}", code="invalid_json")
    if not where:
        return Problem(message="the body is empty or no JSON object; send one, as application/json", code="invalid_json")
    field = ".".join(where)
    if found["type"] == "extra_forbidden":
        return Problem(message=f"{field}: not a field that is served; leave it out", param=where[0], code="unknown_parameter")
    if found["type"] == "missing":
        return Problem(message=f"{field}: required and not given", param=where[0], code="missing_required_parameter")
    return Problem(message=f"{field}={found['input']!r}: {_remedy(found['msg'])}", param=where[0], code="invalid_value")


def _remedy(message: str) -> str:
    return message.removeprefix("Input ").removeprefix("Value error, ")
