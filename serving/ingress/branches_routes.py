"""The routes of /v1/branches: samples, and what is added to them and ended while they run."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import uuid4

from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response

from serving.ingress.engine_client import EngineClient
from serving.ingress.preprocessor import RequestPreprocessor
from serving.ingress.request_body import body_bytes
from serving.ingress.resumption import RequestReader
from serving.ingress.streaming import event_stream
from serving.protocol.branches import (
    AddedSegment,
    BranchesRequest,
    BranchesResponse,
    ForkRequest,
    ForkResponse,
    Segment,
)
from serving.protocol.branches_response import BranchCalls, branches_chunks, branches_response

_MAX_KEY_CHARS = 200
Key = Annotated[str | None, Header(max_length=_MAX_KEY_CHARS)]


def add_branches_routes(app: FastAPI, preprocessor: RequestPreprocessor, engines: EngineClient) -> None:
    reader = RequestReader(preprocessor, engines)

    @app.post("/v1/branches", response_model=BranchesResponse)
    async def branches(body: BranchesRequest, request: Request) -> Response:
        """Continue a main with a tree of branches and reduces, each with settings of its own."""
        work, position = await reader.read(preprocessor.branches, body, request)
        steps = await engines.start(work)
        calls = BranchCalls(work.id, body)
        if body.stream:
            return event_stream(branches_chunks(work, steps, calls), position)
        return JSONResponse(await branches_response(work, steps, calls))

    _add_growth_routes(app, preprocessor, engines)

    @app.delete("/v1/branches/{sample}/branches/{index}", status_code=204)
    async def cancel(sample: str, index: int) -> None:
        """End one segment of a running sample, and all below it."""
        await engines.cancel(sample, index)

    @app.delete("/v1/branches/{sample}", status_code=204)
    async def cancel_all(sample: str) -> None:
        """End a running sample."""
        await engines.cancel(sample, None)


def _add_growth_routes(app: FastAPI, preprocessor: RequestPreprocessor, engines: EngineClient) -> None:
    """Routes that add segments to a running sample. Their output is part of the sample's stream.

    index: of the segment that they continue; without one they continue main.
    A request that is sent again with the same Idempotency-Key adds nothing more.
    """

    async def add(
        how: Literal["join", "reduce"],
        sample: str,
        index: int | None,
        body: Segment,
        request: Request,
        key: str | None,
    ) -> AddedSegment:
        added = await preprocessor.run(preprocessor.added_segment, body, await body_bytes(request))
        (place,) = await engines.add(how, sample, added, index, key or uuid4().hex)
        return AddedSegment(id=sample, **place.model_dump())

    @app.post("/v1/branches/{sample}/branches", status_code=201)
    async def join(sample: str, body: Segment, request: Request, idempotency_key: Key = None) -> AddedSegment:
        """Add a branch to a running sample."""
        return await add("join", sample, None, body, request, idempotency_key)

    @app.post("/v1/branches/{sample}/branches/{index}/branches", status_code=201)
    async def join_segment(
        sample: str, index: int, body: Segment, request: Request, idempotency_key: Key = None
    ) -> AddedSegment:
        """Add a branch below a segment that runs, or whose branches do."""
        return await add("join", sample, index, body, request, idempotency_key)

    @app.post("/v1/branches/{sample}/reduce", status_code=201)
    async def reduce(
        sample: str, body: Segment, request: Request, idempotency_key: Key = None
    ) -> AddedSegment:
        """Give a running sample a reduce, which reads all branches when they have ended."""
        return await add("reduce", sample, None, body, request, idempotency_key)

    @app.post("/v1/branches/{sample}/branches/{index}/reduce", status_code=201)
    async def reduce_segment(
        sample: str, index: int, body: Segment, request: Request, idempotency_key: Key = None
    ) -> AddedSegment:
        """Give a segment with running branches a reduce."""
        return await add("reduce", sample, index, body, request, idempotency_key)

    @app.post("/v1/branches/{sample}/branches/{index}/fork", status_code=201)
    async def fork(
        sample: str, index: int, body: ForkRequest, request: Request, idempotency_key: Key = None
    ) -> ForkResponse:
        """Stop a running segment and continue it with these branches."""
        added = await preprocessor.run(preprocessor.fork, body, await body_bytes(request))
        places = await engines.add("fork", sample, added, index, idempotency_key or uuid4().hex)
        return ForkResponse(id=sample, branches=places)
