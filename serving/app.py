"""The application, engines behind an HTTP front: `serve run --address local serving.app:build lora_path=…`.

Without an address `serve run` joins whatever cluster this machine has last started. `python -m serving` never
does.
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

# How many requests may be open is the gate's business, which answers in OpenAI's shape; Serve's own limits
# must not come first.
_NO_LIMIT = 100_000
# A frozen process is replaced after about three of these.
_HEALTH: dict[str, Any] = {"health_check_period_s": 1.0, "health_check_timeout_s": 4.0}
_LEAVE_S = 20.0  # for the samples of an engine that is to leave; after that they move to another
_DRAIN_S = 300.0  # for the requests of a front that is to leave; they cannot move


def build(args: Mapping[str, Any]) -> Application:
    """The application for these fields of `AppConfig`. Raises UserError for an unknown one and for nothing to
    serve.
    """
    config = AppConfig.of(args)
    engine = serve.deployment(
        max_ongoing_requests=_NO_LIMIT,
        autoscaling_config=_scaling(config),
        graceful_shutdown_timeout_s=_LEAVE_S,
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        **_HEALTH,
    )(EngineReplica)
    front = serve.deployment(
        max_ongoing_requests=_NO_LIMIT,
        max_surge_percent=100,  # in an update a new one is up before the old one goes
        graceful_shutdown_timeout_s=_DRAIN_S,
        ray_actor_options={"num_cpus": 0.1},
        **_HEALTH,
    )(serve.ingress()(Ingress))
    return front.bind(engine.bind(config), config)


def _scaling(config: AppConfig) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=config.min_replicas,
        initial_replicas=config.min_replicas,
        max_replicas=config.max_replicas,
        upscale_delay_s=min(2.0, config.idle_s),
        downscale_delay_s=config.idle_s,
        metrics_interval_s=1.0,
        look_back_period_s=3.0,
        policy=AutoscalingPolicy(
            policy_function=BranchLoadPolicy,
            policy_kwargs={"branches_per_replica": config.branches_per_replica},
        ),
    )
