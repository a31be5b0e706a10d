"""All HTTP routes, as a FastAPI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.staticfiles import StaticFiles

from serving.config import AppConfig
from serving.engine.messages import EngineRequest, StepOutput
from serving.ingress.branches_routes import add_branches_routes
from serving.ingress.engine_client import EngineClient
from serving.ingress.error_handlers import install_error_handlers
from serving.ingress.page_samples import add_samples_route
from serving.ingress.preprocessor import RequestPreprocessor
from serving.ingress.request_body import body_bytes
from serving.ingress.resumption import RequestReader
from serving.ingress.streaming import StreamPosition, event_stream
from serving.ingress.vocabulary import Vocabulary
from serving.observability.metrics import render_metrics
from serving.protocol.errors import ErrorBody
from serving.protocol.openai import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    TokenizeRequest,
)
from serving.protocol.openai_response import (
    ChatFormatter,
    CompletionFormatter,
    ResponseFormatter,
    complete_response,
    linear,
    prompts_only,
    response_chunks,
)
from serving.protocol.responses import ResponsesRequest
from serving.protocol.responses_response import ResponsesFormatter, response_events, whole_response
from serving.protocol.score import ScoreRequest, ScoreResponse, score_response
from serving.protocol.tool_calls import ToolChatFormatter

_WEB_DIR = Path(__file__).parents[1] / "web"
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "a field is wrong",
        401: "no valid API key",
        404: "no such model or sample",
        405: "no such method",
        408: "the body did not arrive in time",
        413: "the body is too long",
        421: "the host is not a name of this server",
        429: "overloaded; Retry-After says when to try again",
        431: "the headers are too long",
        500: "internal server error",
        503: "no engine could finish the request",
        504: "the request took too long",
    }.items()
}


def build_routes(config: AppConfig, preprocessor: RequestPreprocessor, engines: EngineClient) -> FastAPI:
    # FastAPI's documentation pages load scripts from other sites, and its redirect to a path with a slash
    # leads to the host that the client names.
    app = FastAPI(
        title="parallelmind",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=_ERROR_RESPONSES,
    )
    install_error_handlers(app)
    _add_openai_routes(app, config, preprocessor, engines)
    add_branches_routes(app, preprocessor, engines)
    _add_token_routes(app, preprocessor)
    _add_operation_routes(app, engines)
    add_samples_route(app, config)
    _add_pages(app)
    return app


def _add_openai_routes(
    app: FastAPI, config: AppConfig, preprocessor: RequestPreprocessor, engines: EngineClient
) -> None:
    vocabulary, reader = Vocabulary(preprocessor.tokenizer), RequestReader(preprocessor, engines)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[ModelCard(id=name) for name in config.names])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        """One model, also one that /v1/models does not list."""
        await preprocessor.run(preprocessor.require_model, name, 0)
        return ModelCard(id=name)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one prompt, or several, each n times; no answer depends on another one."""
        work, position = await reader.read(preprocessor.completion, body, request)
        echoed = body.prompt if body.echo else []
        formatter = CompletionFormatter(work.id, body.model, vocabulary, echoed, body.n)
        return await _respond(engines, body, work, formatter, position)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation n times; no answer depends on another one."""
        work, position = await reader.read(preprocessor.chat, body, request)
        formatter = ChatFormatter(work.id, body.model, vocabulary)
        if body.shown_tools:
            names = [tool.function.name for tool in body.shown_tools]
            only_one = not body.parallel_tool_calls
            formatter = ToolChatFormatter(work.id, body.model, vocabulary, names, only_one)
        return await _respond(engines, body, work, formatter, position)

    @app.post("/v1/responses", response_model=None)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation once."""
        work, position = await reader.read(preprocessor.responses, body, request)
        steps = linear(await engines.start(work))
        formatter = ResponsesFormatter(work.id, body, work.num_prompt_tokens, vocabulary)
        if body.stream:
            return event_stream(response_events(formatter, steps), position)
        return JSONResponse(await whole_response(formatter, steps))

    @app.post("/v1/score")
    async def score(body: ScoreRequest, request: Request) -> ScoreResponse:
        """The log-probabilities of options after one text, which is read once."""
        work = await preprocessor.run(preprocessor.score, body, await body_bytes(request))
        return await score_response(work, await engines.start(work))


async def _respond(
    engines: EngineClient,
    body: CompletionRequest | ChatRequest,
    work: EngineRequest,
    formatter: ResponseFormatter,
    position: StreamPosition,
) -> Response:
    steps: AsyncIterator[StepOutput] = linear(await engines.start(work))
    if isinstance(body, CompletionRequest) and body.decodes_nothing:
        steps = prompts_only(steps)
    if body.stream:
        chunks = response_chunks(formatter, work.num_prompt_tokens, steps, body.wants_usage)
        return event_stream(chunks, position)
    return JSONResponse(await complete_response(formatter, work.num_prompt_tokens, steps))


def _add_token_routes(app: FastAPI, preprocessor: RequestPreprocessor) -> None:
    @app.post("/tokenize", response_model=None)
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        tokens = await preprocessor.run(preprocessor.tokenize, body, await body_bytes(request))
        # FastAPI's own encoder would visit every token.
        return JSONResponse(
            {"tokens": tokens, "count": len(tokens), "max_model_len": preprocessor.max_context_tokens}
        )

    @app.post("/detokenize", response_model=None)
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        text = await preprocessor.run(preprocessor.detokenize, body, await body_bytes(request))
        return JSONResponse({"prompt": text})


def _add_operation_routes(app: FastAPI, engines: EngineClient) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether an engine computes."""
        healthy = await engines.is_healthy()
        return JSONResponse({"status": "ok" if healthy else "no engine computes"}, 200 if healthy else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """The metrics of all processes in Prometheus' text format."""
        return Response(render_metrics(await engines.metric_families()), media_type=CONTENT_TYPE_LATEST)


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_WEB_DIR / "index.html", headers=_PAGE_HEADERS)

    app.mount("/web", StaticFiles(directory=_WEB_DIR), name="web")
