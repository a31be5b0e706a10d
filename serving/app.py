"""The Serve application: engines behind an HTTP ingress.

    serve run --address local serving.app:build lora_path=…

Without an address `serve run` joins the cluster that was started last on this machine; `python -m serving`
always starts its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from serving.config import AppConfig
from serving.engine.autoscaling import BranchLoadPolicy
from serving.engine.replica import EngineReplica
from serving.ingress.ingress import Ingress
from serving.runtime.replica_resources import decide_resources, ingress_cpus

# RequestLimitsMiddleware bounds the open requests and answers in OpenAI's format; Serve's own limits must not
# come first.
_MAX_ONGOING_REQUESTS = 100_000
# A frozen process is replaced after about three failed checks.
_HEALTH_CHECKS: dict[str, Any] = {"health_check_period_s": 1.0, "health_check_timeout_s": 4.0}
_ENGINE_SHUTDOWN_S = 20.0  # for its samples to end; after that they move to another engine
_INGRESS_SHUTDOWN_S = 300.0  # for its requests to end; they cannot move


def build(args: Mapping[str, Any]) -> Application:
    """The application for these fields of `AppConfig`. Raises UserError for fields that are wrong."""
    config = decide_resources(AppConfig.of(args))
    engine = serve.deployment(
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        autoscaling_config=_autoscaling(config),
        graceful_shutdown_timeout_s=_ENGINE_SHUTDOWN_S,
        ray_actor_options={"num_cpus": config.replicas.num_cpus, "num_gpus": config.replicas.num_gpus},
        **_HEALTH_CHECKS,
    )(EngineReplica)
    ingress = serve.deployment(
        num_replicas=config.replicas.num_fronts,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        max_surge_percent=100,  # an update starts the new replica before it stops the old one
        graceful_shutdown_timeout_s=_INGRESS_SHUTDOWN_S,
        ray_actor_options={"num_cpus": ingress_cpus(config.replicas.num_fronts)},
        **_HEALTH_CHECKS,
    )(serve.ingress()(Ingress))
    return ingress.bind(engine.bind(config), config)


def _autoscaling(config: AppConfig) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=config.replicas.min_replicas,
        initial_replicas=config.replicas.min_replicas,
        max_replicas=config.replicas.max_replicas,
        upscale_delay_s=min(2.0, config.replicas.idle_s),
        downscale_delay_s=config.replicas.idle_s,
        metrics_interval_s=1.0,
        look_back_period_s=3.0,
        policy=AutoscalingPolicy(
            policy_function=BranchLoadPolicy,
            policy_kwargs={"branches_per_replica": config.replicas.branches_per_replica},
        ),
    )
