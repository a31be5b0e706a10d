"""The ingress deployment: an ASGI application in front of the engines."""

from __future__ import annotations

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from serving.config import AppConfig
from serving.engine.load_model import load_tokenizer, max_context_tokens
from serving.ingress.api_keys import ApiKeys, read_api_keys
from serving.ingress.engine_client import EngineClient
from serving.ingress.hosts import AllowedHosts
from serving.ingress.preprocessor import RequestPreprocessor
from serving.ingress.request_id import with_request_id
from serving.ingress.request_limits import RequestLimitsMiddleware
from serving.ingress.routes import build_routes
from serving.observability.log import configure_log
from serving.observability.metrics import IngressMetrics, MetricFamily
from serving.runtime.ray_private import bind_replica_port_to_node_address


class Ingress:
    """Holds the tokenizer, the client of the engines and the metrics of this process."""

    def __init__(self, engine: DeploymentHandle, config: AppConfig) -> None:
        bind_replica_port_to_node_address()
        configure_log(config.log.log_level)
        self._config = config
        self.metrics, self._name, fronts = IngressMetrics(), "front", None
        if config.replicas.num_fronts > 1:
            context = serve.get_replica_context()
            self._name = f"front-{context.replica_id.unique_id}"
            fronts = serve.get_deployment_handle(context.deployment, context.app_name)
        self.engines = EngineClient(engine, config, self.metrics, fronts)
        self.preprocessor = RequestPreprocessor(config, load_tokenizer(config), max_context_tokens(config))

    async def own_metrics(self) -> tuple[str, list[MetricFamily]]:
        """The name of this process and its metrics; called by all of several ingress processes."""
        return self._name, self.metrics.families()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The application that Serve calls. Raises UserError for API keys that cannot be read."""
        routes = build_routes(self._config, self.preprocessor, self.engines)
        access = self._config.access
        keys, hosts = ApiKeys(read_api_keys(access.api_keys_file)), AllowedHosts(access.allowed_hosts)
        limited = RequestLimitsMiddleware(routes, self._config.limits, keys, hosts, self.metrics)
        app = with_request_id(limited)
        if not access.cors_origins:
            return app
        # Outermost: a browser's preflight request has no key, and it must be able to read a rejection.
        return CORSMiddleware(
            app,
            allow_origins=access.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],  # clients send headers of their own; no cookie is read
        )
