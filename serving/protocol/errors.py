"""Errors in OpenAI's format, with the HTTP statuses that its clients expect."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
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


_FIELD = re.compile(r"([a-z_]\w*(?:\[\d+\])?(?:\.\w+(?:\[\d+\])?)*)[=:]")
_FIELD_OF_VALUE = re.compile(r"([a-z_][\w.\[\]]*)=")
_TYPE_NAME = re.compile(r"^(str|int)$|\[|^[A-Z]")  # in the location of an error; no field has such a name
_TOO_LONG = re.compile(r"the prompt is too long|exceed the model's \d+ positions")
_LIBRARY_NAME = re.compile(r"\bmax_new_tokens\b")  # the library's name of max_tokens
_MAX_SHOWN_CHARS = 80  # of a wrong value
_WORDS_OF_JSON = [
    (re.compile(pattern), word)
    for pattern, word in {
        r"\bNone\b": "null",
        r"\bTrue\b": "true",
        r"\bFalse\b": "false",
        r"'": '"',
        r"a valid list\b": "an array",
        r"a valid dictionary(?: or .*)?": "an object",
    }.items()
]

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


def engine_killed_error() -> RequestError:
    """The error of a request that was on two engines, one after the other, when they were lost."""
    message = "two engines were lost while they decoded this request, which may be the cause; change it"
    info = ErrorInfo(message=message, type="server_error", code="engine_killed")
    return RequestError(500, info, {"x-should-retry": "false"})  # which OpenAI's clients heed


def overloaded_error(message: str = OVERLOADED.message) -> RequestError:
    return RequestError(429, OVERLOADED.model_copy(update={"message": message}), {"retry-after": "1"})


def user_error(message: str, status: int = 400) -> RequestError:
    """The error of a UserError, whose message begins with `field=value` or `field:` if a field caused it."""
    message = _with_json_value(_LIBRARY_NAME.sub("max_tokens", message))
    field = _FIELD.match(message)
    if status == 400 and field and field[1] == "model":
        return RequestError(404, ErrorInfo(message=message, param="model", code="model_not_found"))
    if status == 429:
        return overloaded_error(message)
    if status == 503:
        return RequestError(503, ENGINE_LOST.model_copy(update={"message": message}), {"retry-after": "1"})
    code = "context_length_exceeded" if _TOO_LONG.search(message) else "invalid_value"
    return RequestError(status, ErrorInfo(message=message, param=field[1] if field else None, code=code))


def _with_json_value(message: str) -> str:
    """The message with the value after its field in JSON; the library writes it in Python."""
    field = _FIELD_OF_VALUE.match(message)
    ends = [found.start() for found in re.finditer(": ", message)] if field else []
    for end in ends:  # a value may hold the separator, too
        try:
            value = ast.literal_eval(message[len(field[0]) : end])  # type: ignore[index]
            return f"{field[0]}{json.dumps(value, ensure_ascii=False)}{message[end:]}"  # type: ignore[index]
        except (
            ValueError,
            SyntaxError,
            TypeError,
            MemoryError,
            RecursionError,
        ):  # shortened, or not a literal
            continue
    return message


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


def validation_error_info(errors: Sequence[dict[str, Any]]) -> ErrorInfo:
    """The error of FastAPI's validation errors, whose `loc` is ("body", field, …).

    Of several the most nested one is shown: it tells which of several forms a value was meant to have.
    """
    error = max(errors, key=lambda error: len(error["loc"]))
    if error["type"] == "json_invalid":
        return ErrorInfo(message=f"invalid JSON: {error['ctx']['error']}", code="invalid_json")
    if error["type"] == "recursion_depth_exceeded":
        message = "branches: are nested too deeply; nest fewer of them"
        return ErrorInfo(message=message, param="branches", code="invalid_value")
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
    if error["type"] == "union_tag_invalid":
        tag, expected = json.dumps(error["ctx"]["tag"]), error["ctx"]["expected_tags"].replace("'", '"')
        message = f"{field}.type={tag}: should be one of {expected}"
        return ErrorInfo(message=message, param=f"{field}.type", code="invalid_value")
    value = json.dumps(error["input"], ensure_ascii=False, default=str)
    value = value if len(value) <= _MAX_SHOWN_CHARS else f"{value[:_MAX_SHOWN_CHARS]}…"
    return ErrorInfo(message=f"{field}={value}: {_remedy(error)}", param=field, code="invalid_value")


def _remedy(error: dict[str, Any]) -> str:
    """What pydantic says about a value, in the words of JSON."""
    remedy = str(error["msg"]).removeprefix("Input ").removeprefix("String ").removeprefix("Value error, ")
    if error["type"] == "value_error":
        return remedy
    for pattern, word in _WORDS_OF_JSON:
        remedy = pattern.sub(word, remedy)
    return remedy


def _field_name(location: tuple[Any, ...]) -> str:
    """`branches[1].text` for ("body", "branches", 1, "text"), without the names of types."""
    parts = [str(part) for part in location[1:] if not _TYPE_NAME.search(str(part))]
    return re.sub(r"\.(\d+)\b", r"[\1]", ".".join(parts))
