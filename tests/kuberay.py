"""What the manifests in docs/deploy use of KubeRay's ray.io/v1, by hand: its own schemas come in no package.

A field that stands here under another name, or with another type, than in KubeRay 1.6 would not be found out.
What is in pods is checked against Kubernetes' published schemas, by the package kubernetes-validate.
"""

from __future__ import annotations

from typing import Any, Literal

import kubernetes_validate
import yaml
from pydantic import AliasGenerator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from servers import ROOT

DEPLOY = ROOT / "docs" / "deploy"
_KUBERNETES = "1.32"


class Known(BaseModel):
    """Refuses what it does not know, as the API server does under strict validation."""

    model_config = ConfigDict(
        extra="forbid", strict=True, alias_generator=AliasGenerator(validation_alias=to_camel)
    )


class Authentication(Known):
    mode: Literal["token"]


class Autoscaler(Known):
    idle_timeout_seconds: int
    security_context: dict[str, Any]


class Head(Known):
    ray_start_params: dict[str, str]
    template: dict[str, Any]


class Workers(Head):
    group_name: str
    replicas: int = Field(ge=0)
    min_replicas: int = Field(ge=0)
    max_replicas: int = Field(ge=1)


class Cluster(Known):
    ray_version: str
    auth_options: Authentication
    enable_in_tree_autoscaling: Literal[True]
    autoscaler_options: Autoscaler
    head_group_spec: Head
    worker_group_specs: list[Workers]


class JobSpec(Known):
    entrypoint: str
    runtime_env: str = Field(validation_alias="runtimeEnvYAML")
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: int
    cluster: Cluster = Field(validation_alias="rayClusterSpec")


class ServiceSpec(Known):
    serve_config: str = Field(validation_alias="serveConfigV2")
    cluster: Cluster = Field(validation_alias="rayClusterConfig")


class Metadata(Known):
    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,46}$")  # KubeRay puts more behind it


class Job(Known):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class Service(Known):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: ServiceSpec


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def job() -> JobSpec:
    return Job.model_validate(read("rayjob.yaml")).spec


def service() -> ServiceSpec:
    return Service.model_validate(read("rayservice.yaml")).spec


def pods(cluster: Cluster) -> list[dict[str, Any]]:
    """The specs of its pods, the head's first."""
    return [group.template["spec"] for group in (cluster.head_group_spec, *cluster.worker_group_specs)]


def validate(kind: str, **parts: Any) -> None:
    """Raises for an object of Kubernetes' core that its API server would refuse, unknown fields included."""
    kubernetes_validate.validate({"apiVersion": "v1", "kind": kind, **parts}, _KUBERNETES, strict=True)
