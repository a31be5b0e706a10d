"""The application, one engine behind an HTTP front: `serve run --address local serving.app:build lora_path=…`.

Without an address `serve run` joins whatever cluster this machine has last started. `python -m serving` never does.
"""

# Serve copies the routes by value as soon as it sees them. So their annotations are real objects here (names in text would
# mean nothing to FastAPI in a replica), and their helpers lie in other modules.

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from serving.answer import resumed, server_sent, whole
from serving.engine import Engine, Refusal
from serving.errors import RequestError, install, refusal
from serving.ports import keep_on_node_address
from serving.schema import CompletionRequest, ModelCard, ModelList, Problem
from serving.settings import AppConfig

# Requests that wait for the engine are open ones; Serve's own limit of 5 would keep /health waiting behind them.
_OPEN_REQUESTS = 256

api = FastAPI(title="parallelmind", docs_url=None, redoc_url=None)  # the docs pages load scripts from elsewhere
install(api)


def build(args: dict[str, str]) -> Application:
    """The application for these fields of `AppConfig`. Raises UserError for an unknown one and for nothing to serve."""
    config = AppConfig.of(args)
    engine = serve.deployment(max_ongoing_requests=_OPEN_REQUESTS)(Engine)
    front = serve.deployment(max_ongoing_requests=_OPEN_REQUESTS, ray_actor_options={"num_cpus": 0.1})(Front)
    return front.bind(engine.bind(config), config.name)


@serve.ingress(api)
class Front:
    """Speaks HTTP and OpenAI's shapes; holds no model."""

    def __init__(self, engine: DeploymentHandle, name: str) -> None:
        keep_on_node_address()
        self._engine = engine.options(stream=True)
        self._card = ModelCard(id=name)

    @api.get("/health")
    def health(self) -> dict[str, str]:
        """Whether requests are taken. That the engine lives is Serve's own concern: it checks and replaces it."""
        return {"status": "ok"}

    @api.get("/v1/models")
    def models(self) -> ModelList:
        return ModelList(data=[self._card])

    @api.post("/v1/completions", response_model=None)
    async def completions(self, request: CompletionRequest) -> Response:
        """Continue one prompt, or several as the branches of one sample."""
        if request.model != self._card.id:
            message = f"model={request.model!r}: not served here; use {self._card.id!r}"
            raise RequestError(404, Problem(message=message, param="model", code="model_not_found"))
        steps: Any = self._engine.decode.remote("", request.prompt, request.sampling())
        first = await anext(steps)  # before any answer: a refusal must not become a 200
        if isinstance(first, Refusal):
            raise refusal(first.message)
        all_steps = resumed(first, steps)
        if request.stream:
            return StreamingResponse(server_sent(request, all_steps), media_type="text/event-stream")
        return JSONResponse((await whole(request, all_steps)).model_dump())
