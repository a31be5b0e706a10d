"""Responses as server-sent events in OpenAI's form: `data: {…}` for every chunk, then `data: [DONE]`.

An event of /v1/responses has a type, which is the name of its server-sent event, too.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus

from serving.observability.log import log
from serving.protocol.errors import INTERNAL_ERROR, ErrorBody, error_info

# A stream of a server that is shutting down is read to its end: Serve drains replicas itself.
AppStatus.disable_automatic_graceful_drain()


_KEEP_ALIVE_S = 10.0  # proxies close connections that are silent for half a minute


def event_stream(chunks: AsyncIterator[dict[str, Any]]) -> EventSourceResponse:
    """Stream the chunks, with a comment every ten seconds, which clients ignore."""
    response = EventSourceResponse(
        server_sent_events(chunks), ping=_KEEP_ALIVE_S, ping_message_factory=_keep_alive, sep="\n"
    )
    del response.headers["connection"]  # the HTTP server decides whether a connection is kept
    return response


def _keep_alive() -> ServerSentEvent:
    return ServerSentEvent(comment="keep-alive", sep="\n")


async def server_sent_events(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[ServerSentEvent]:
    """An event for every chunk.

    A failure is an event too, since the status has been sent. A stream without [DONE] was cut off.
    """
    try:
        async for chunk in chunks:
            yield _json_event(chunk)
    except Exception as error:
        info = error_info(error)
        if info is INTERNAL_ERROR:
            log.exception("a stream failed")
        yield _json_event(ErrorBody(error=info).model_dump())
    yield ServerSentEvent("[DONE]", sep="\n")


def _json_event(content: dict[str, Any]) -> ServerSentEvent:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return ServerSentEvent(text, event=content.get("type"), sep="\n")
