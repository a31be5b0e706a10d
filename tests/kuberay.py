"""The part of KubeRay's ray.io/v1 that the manifests in docs/deploy use, as strict pydantic models.

No package holds KubeRay's own schemas, so these models are written by hand after KubeRay 1.6: a mistake in
them is not detected. Pods are checked against Kubernetes' published schemas by kubernetes-validate.
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


class StrictModel(BaseModel):
    """Refuses unknown fields, as the API server does under strict validation."""

    model_config = ConfigDict(
        extra="forbid", strict=True, alias_generator=AliasGenerator(validation_alias=to_camel)
    )


class Authentication(StrictModel):
    mode: Literal["token"]


class Autoscaler(StrictModel):
    idle_timeout_seconds: int
    security_context: dict[str, Any]


class Head(StrictModel):
    ray_start_params: dict[str, str]
    template: dict[str, Any]


class Workers(Head):
    group_name: str
    replicas: int = Field(ge=0)
    min_replicas: int = Field(ge=0)
    max_replicas: int = Field(ge=1)


class Cluster(StrictModel):
    ray_version: str
    auth_options: Authentication
    enable_in_tree_autoscaling: Literal[True]
    autoscaler_options: Autoscaler
    head_group_spec: Head
    worker_group_specs: list[Workers]


class JobSpec(StrictModel):
    entrypoint: str
    runtime_env: str = Field(validation_alias="runtimeEnvYAML")
    shutdown_after_job_finishes: bool
    ttl_seconds_after_finished: int
    cluster: Cluster = Field(validation_alias="rayClusterSpec")


class ServiceSpec(StrictModel):
    serve_config: str = Field(validation_alias="serveConfigV2")
    cluster: Cluster = Field(validation_alias="rayClusterConfig")


class Metadata(StrictModel):
    name: str = Field(pattern=r"^[a-z][a-z0-9-]{0,46}$")  # KubeRay appends a suffix


class Job(StrictModel):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class Service(StrictModel):
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
    """The pod specs of a cluster, the head's first."""
    return [group.template["spec"] for group in (cluster.head_group_spec, *cluster.worker_group_specs)]


def validate(kind: str, **parts: Any) -> None:
    """Raise if the Kubernetes API server would refuse the object; unknown fields count."""
    kubernetes_validate.validate({"apiVersion": "v1", "kind": kind, **parts}, _KUBERNETES, strict=True)
