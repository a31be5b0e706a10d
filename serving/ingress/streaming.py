"""Responses as server-sent events in OpenAI's form: `data: {…}` for every chunk, then `data: [DONE]`.

An event of /v1/responses has a type, which is the name of its server-sent event, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import AppStatus

from serving.observability.log import log
from serving.protocol.errors import INTERNAL_ERROR, ErrorBody, error_info, user_error

# A stream of a server that is shutting down is read to its end: Serve drains replicas itself.
AppStatus.disable_automatic_graceful_drain()

KEEP_ALIVE_S = 10.0  # proxies close connections that are silent for half a minute
LAST_EVENT_ID = "last-event-id"  # the header
_POSITION = re.compile(r"([a-z]+-[0-9a-f]{32}):(\d{1,9})", re.ASCII)
_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """The id of an event: the stream, and the number of its chunks up to this one.

    The chunks of a stream are the same whenever they are made of the same steps.
    """

    id: str
    num_chunks: int = 0

    @classmethod
    def parse(cls, text: str) -> StreamPosition:
        """Raises RequestError for a text that is not the id of an event."""
        match = _POSITION.fullmatch(text)
        if match is None:
            raise user_error(
                f"{LAST_EVENT_ID}={text[:80]!r}: not the id of an event; send the last one, or none"
            )
        return cls(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"{self.id}:{self.num_chunks}"


def event_stream(chunks: AsyncIterator[dict[str, Any]], position: StreamPosition) -> EventSourceResponse:
    """Stream the chunks after `position`, with a comment every ten seconds, which clients ignore."""
    events = server_sent_events(chunks, position)
    response = EventSourceResponse(events, ping=KEEP_ALIVE_S, ping_message_factory=_keep_alive, sep="\n")
    del response.headers["connection"]  # the HTTP server decides whether a connection is kept
    return response


def _keep_alive() -> ServerSentEvent:
    return ServerSentEvent(comment="keep-alive", sep="\n")


async def server_sent_events(
    chunks: AsyncIterator[dict[str, Any]], position: StreamPosition
) -> AsyncIterator[bytes]:
    """An event for every chunk after `position`, whose id tells its own position.

    A failure is an event too, since the status has been sent. A stream without [DONE] was cut off.
    """
    try:
        num_chunks = 0
        async for chunk in chunks:
            num_chunks += 1
            if num_chunks > position.num_chunks:
                yield _json_event(chunk, str(StreamPosition(position.id, num_chunks)))
    except Exception as error:
        info = error_info(error)
        if info is INTERNAL_ERROR:
            log.exception("a stream failed")
        yield _json_event(ErrorBody(error=info).model_dump())
    yield b"data: [DONE]\n\n"


def _json_event(content: dict[str, Any], id: str | None = None) -> bytes:
    """One event, in bytes: ServerSentEvent would look for line breaks, which neither JSON nor an id has."""
    id_line = "" if id is None else f"id: {id}\n"
    type_line = f"event: {content['type']}\n" if "type" in content else ""
    return f"{id_line}{type_line}data: {_to_json(content)}\n\n".encode()
