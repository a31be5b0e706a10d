"""Every request has an id: the client's `x-request-id`, or a new one where that is missing or malformed.

The response and every log line of the request hold it.
"""

from __future__ import annotations

import re

from asgi_correlation_id import CorrelationIdMiddleware
from starlette.types import ASGIApp

_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


def with_request_id(app: ASGIApp) -> ASGIApp:
    return CorrelationIdMiddleware(
        app,
        header_name="x-request-id",
        update_request_header=False,  # the size of the headers is checked as the client sent them
        validator=lambda value: _REQUEST_ID.fullmatch(value) is not None,
        transformer=None,
    )
