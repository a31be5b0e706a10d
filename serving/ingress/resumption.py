"""Streams whose clients come back: with the id of the last event that they have read they get the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request

from serving.engine.messages import EngineRequest
from serving.ingress.engine_client import EngineClient
from serving.ingress.preprocessor import RequestPreprocessor
from serving.ingress.request_body import body_bytes
from serving.ingress.streaming import LAST_EVENT_ID, StreamPosition
from serving.protocol.errors import user_error

BodyT = TypeVar("BodyT", bound=Any)


class RequestReader:
    """Turns a body into a request of the engines, or finds the one that its client comes back to."""

    def __init__(self, preprocessor: RequestPreprocessor, engines: EngineClient) -> None:
        self._preprocessor, self._engines = preprocessor, engines

    async def read(
        self, prepare: Callable[[BodyT], EngineRequest], body: BodyT, request: Request
    ) -> tuple[EngineRequest, StreamPosition]:
        """The request, and what its client has read of the response.

        prepare: a method of the preprocessor. Raises RequestError for a request that is not served.
        """
        work = await self._preprocessor.run(prepare, body, await body_bytes(request))
        if not body.stream:
            return work, StreamPosition(work.id)
        last_id = request.headers.get(LAST_EVENT_ID)
        if last_id is None:
            return work.with_history(), StreamPosition(work.id)
        position = StreamPosition.parse(last_id)
        history = await self._engines.end_stream(position.id)
        if not work.repeats(history.request):
            raise user_error(
                f"{LAST_EVENT_ID}={last_id!r}: its request was another one; send the same body again"
            )
        return history.resumed(), position
