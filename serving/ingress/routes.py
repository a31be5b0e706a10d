"""Every route, as FastAPI serves it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.staticfiles import StaticFiles

from serving.engine.messages import EngineRequest
from serving.ingress.ingress import Ingress
from serving.observability.metrics import exposition
from serving.protocol import branch_response as branch_answer
from serving.protocol import response as answer
from serving.protocol.branches import AddBranchRequest, BranchesAnswer, BranchesRequest, Joined
from serving.protocol.errors import install
from serving.protocol.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ErrorBody,
    ModelCard,
    ModelList,
    TokenizeRequest,
)

_WEB = Path(__file__).parents[1] / "web"
_STRICT = {
    "content-security-policy": "default-src 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning}
    for status, meaning in {
        400: "a field is wrong",
        401: "no valid API key",
        404: "no such model or sample",
        405: "no such method",
        408: "the body did not come in time",
        413: "the body is too long",
        429: "busy; Retry-After says when to come again",
        431: "the headers are too long",
        500: "the server failed",
        503: "no engine could go on",
        504: "it took too long",
    }.items()
}


def routes(front: Ingress) -> FastAPI:
    """The application around a front."""
    app = FastAPI(
        title="parallelmind", docs_url=None, redoc_url=None, responses=_PROBLEMS
    )  # docs pages load foreign scripts
    install(app)
    _openai(app, front)
    _branches(app, front)
    _tokens(app, front)
    _operation(app, front)
    _page(app)
    return app


def _openai(app: FastAPI, front: Ingress) -> None:
    spell, encoded = front.asker.spell, front.asker.encoded

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[ModelCard(id=name) for name in front.config.names])

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt, or several as the branches of one sample."""
        work = await front.work(front.asker.completion, body, await _size(request))
        return await _answer(front, body, work, answer.CompletionFormatter(work.id, body.model, spell))

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, n times as n branches that share it."""
        work = await front.work(front.asker.chat, body, await _size(request))
        return await _answer(front, body, work, answer.ChatFormatter(work.id, body.model, spell, encoded))


async def _answer(
    front: Ingress,
    body: CompletionRequest | ChatRequest,
    work: EngineRequest,
    shape: answer.ResponseFormatter,
) -> Response:
    steps = await front.begin(work)
    read = len(work.asked.tokens.ids)
    if body.stream:
        return _stream(answer.parts(shape, read, steps, body.wants_usage))
    return JSONResponse(await answer.whole(shape, read, steps))


def _stream(bodies: AsyncIterator[dict[str, Any]]) -> Response:
    return StreamingResponse(
        answer.server_sent(bodies),
        media_type="text/event-stream",
        headers={"cache-control": "no-store", "x-accel-buffering": "no"},
    )


def _branches(app: FastAPI, front: Ingress) -> None:
    @app.post("/v1/branches", response_model=BranchesAnswer)
    async def branches(body: BranchesRequest, request: Request) -> Response:
        """Continue branches that share a main, each with settings of its own."""
        work = await front.work(front.asker.branches, body, await _size(request))
        steps = await front.begin(work)
        if body.stream:
            return _stream(branch_answer.parts(work, steps))
        return JSONResponse(await branch_answer.whole(work, steps))

    @app.post("/v1/branches/{sample}/branches", status_code=201)
    async def join(sample: str, body: AddBranchRequest, request: Request) -> Joined:
        """Add a branch to a sample that is going on; its stream tells what it says."""
        ids, params = await front.work(front.asker.joining, body, await _size(request))
        return Joined(id=sample, index=await front.join(sample, ids, params))

    @app.delete("/v1/branches/{sample}/branches/{index}", status_code=204)
    async def cancel(sample: str, index: int) -> None:
        """End one branch of a sample that is going on."""
        await front.cancel(sample, index)

    @app.delete("/v1/branches/{sample}", status_code=204)
    async def cancel_all(sample: str) -> None:
        """End a sample that is going on."""
        await front.cancel(sample, None)


def _tokens(app: FastAPI, front: Ingress) -> None:
    @app.post("/tokenize", response_model=None)
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        tokens = await front.work(front.asker.tokenize, body, await _size(request))
        # Written at once: FastAPI would look at every token.
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": front.asker.context})

    @app.post("/detokenize", response_model=None)
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        return JSONResponse({"prompt": await front.work(front.asker.detokenize, body, await _size(request))})


def _operation(app: FastAPI, front: Ingress) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether an engine answers and computes."""
        well = await front.healthy()
        return JSONResponse({"status": "ok" if well else "no engine computes"}, 200 if well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """What Prometheus reads, of all engines too."""
        return Response(exposition(await front.all_meters()), media_type=CONTENT_TYPE_LATEST)


def _page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_WEB / "index.html", headers=_STRICT)

    app.mount("/web", StaticFiles(directory=_WEB), name="web")


async def _size(request: Request) -> int:
    """Of the body, which has been read. Its length need not be in the headers."""
    return len(await request.body())
