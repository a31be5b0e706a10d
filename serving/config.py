"""Configuration of an application: what it serves, its limits, its replicas.

Every value may be given as text, the only type that `serve run` passes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from os.path import isfile
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, field_validator, model_validator

from parallelmind.config import (
    AdapterPath,
    DtypeOrAuto,
    FrozenConfig,
    GroupedConfig,
    HomePath,
    TrackingUri,
    Visibility,
    resolve,
)
from parallelmind.config.yaml_file import parse_yaml
from parallelmind.storage import expand_home

BASE = "base"  # the base model's name in requests, and the prefix of adapters' names
REGISTRY = "models:/"  # prefix of names in the model registry
_ADAPTER_DIR = "adapter"  # name of the adapter folder in a run folder
_ADAPTER_NAME = re.compile(r"\w[\w.-]{0,99}")  # a single path component: it cannot leave adapter_root

AppT = TypeVar("AppT", bound="AppConfig")


def registered_name(location: str) -> str:
    """NAME of models:/NAME@ALIAS and of models:/NAME/VERSION."""
    return location.removeprefix(REGISTRY).partition("@")[0].partition("/")[0]


class _Group(FrozenConfig):
    """Group of fields that may be given as text."""

    model_config = ConfigDict(strict=False)


class ServedModelConfig(_Group):
    """Model."""

    lora_path: AdapterPath | None = Field(
        None, min_length=1, description="adapter folder; null: the base model alone"
    )
    base_model: str | None = Field(
        None, min_length=1, description="smollm2-135m, a folder, or a hub id; null: the adapter's base"
    )
    served_name: str | None = Field(
        None,
        min_length=1,
        description="name of the model in requests; null: the name of the run or of the base model",
    )
    dtype: DtypeOrAuto = Field(
        "auto",
        description="compute dtype; auto: bfloat16 on a GPU that computes it in hardware, else float32",
    )
    rope_2d_ratio: float | None = Field(
        None, ge=0, le=1, description="share of rotary pairs driven by pos2d; null: as trained"
    )
    visibility: Visibility | None = Field(
        None, description="columnar: branches attend to each other's past; isolated: not; null: as trained"
    )
    trust_remote_code: bool = Field(False, description="allow a model of the hub to run its own code")

    @model_validator(mode="after")
    def _require_model(self) -> Self:
        if self.lora_path is None and self.base_model is None:
            raise ValueError(
                "lora_path: required and not given; "
                "add lora_path=runs/NAME-HASH/adapter or base_model=smollm2-135m"
            )
        return self

    @property
    def name(self) -> str:
        """The name of the model in requests; never a path of this machine."""
        if self.served_name:
            return self.served_name
        path = Path(self.lora_path or expand_home(self.base_model or ""))
        if self.lora_path:
            path = path if path.name else path.absolute()  # "." has no name
            return path.parent.name if path.name == _ADAPTER_DIR and path.parent.name else path.name
        return path.name if path.is_absolute() else str(path)


class AdaptersConfig(_Group):
    """Adapters."""

    adapters: dict[str, AdapterPath] = Field(
        {}, description="further adapters by name, each a folder or models:/NAME@ALIAS"
    )
    adapter_root: HomePath | None = Field(
        None, description="folder of adapters that requests may name as base:NAME"
    )
    mlflow_uri: TrackingUri | None = Field(
        None, description="model registry of models:/ names, which requests may use too"
    )
    max_adapters: int = Field(
        8, ge=1, description="adapters that an engine keeps loaded; the least recently used is evicted"
    )
    max_adapter_bytes: int = Field(
        4 << 30, ge=1, description="size of an adapter's files; a larger one is refused"
    )
    registry_models: list[str] | None = Field(
        None, description="names in the registry that requests may use as models:/NAME…; null: all"
    )
    refresh_s: float = Field(
        10,
        gt=0,
        description="seconds between two checks of a loaded adapter for a new version, and for which an "
        "adapter that cannot be loaded is not tried again",
    )

    @field_validator("adapters", mode="before")
    @classmethod
    def _parse_text(cls, value: Any) -> Any:
        """Text is YAML; an empty one is no adapter."""
        return parse_yaml(value or "{}") if isinstance(value, str) else value

    @field_validator("registry_models", mode="before")
    @classmethod
    def _parse_list(cls, value: Any) -> Any:
        return parse_yaml(value) if isinstance(value, str) else value

    def _may_name(self, location: str) -> bool:
        """Whether requests may name this model of the registry."""
        allowed = self.registry_models
        return self.mlflow_uri is not None and (allowed is None or registered_name(location) in allowed)

    def locate(self, model: str) -> str | None:
        """Where the adapter of this name is: a folder, or models:/…; None if there is no such adapter."""
        from parallelmind.model.manifest import MANIFEST  # imports transformers: not for --help

        if model.startswith(REGISTRY):
            return model if self._may_name(model) else None
        name = model.removeprefix(f"{BASE}:")
        if name in self.adapters:
            return self.adapters[name]
        if self.adapter_root is None or not _ADAPTER_NAME.fullmatch(name):
            return None
        folder = Path(self.adapter_root) / name
        for adapter_dir in (folder / _ADAPTER_DIR, folder):
            if isfile(adapter_dir / MANIFEST):  # Path.is_file raises for names that are too long
                return str(adapter_dir)
        return None


class RequestLimits(_Group):
    """Request limits. Each ingress process counts its own open requests."""

    max_requests: int = Field(128, ge=1, description="open requests; further ones get status 429 at once")
    max_branches: int = Field(
        64, ge=1, le=256, description="branches of one sample, or answers of one request"
    )
    max_prompt_tokens: int = Field(
        8192, ge=1, description="prompt tokens of one sample, or of one of several independent prompts"
    )
    max_new_tokens: int = Field(4096, ge=1, description="new tokens of one branch")
    max_body_bytes: int = Field(1 << 20, ge=1024, description="bytes of a request body")
    max_header_bytes: int = Field(16 << 10, ge=1024, description="bytes of the headers of a request")
    timeout_s: float = Field(600, gt=0, description="seconds that a request may take")
    slow_client_s: float = Field(
        30, gt=0, description="seconds that the server waits for a client to send its body or to read"
    )


_Amount = Annotated[float, Field(ge=0)] | Literal["auto"]


class ReplicasConfig(_Group):
    """Engine replicas."""

    min_replicas: int = Field(1, ge=0, description="minimum number of engines")
    max_replicas: int = Field(1, ge=1, description="maximum number of engines")
    num_fronts: int = Field(1, ge=1, description="HTTP ingress processes, spread over the nodes")
    branches_per_replica: float = Field(
        16, gt=0, description="live and waiting branches per engine that autoscaling aims at"
    )
    idle_s: float = Field(60, ge=0, description="seconds of lower load before an engine is removed")
    num_cpus: _Amount = Field(
        "auto", description="CPUs that Ray reserves for an engine; auto: an equal share of a node"
    )
    num_gpus: _Amount = Field(
        "auto",
        description="GPUs that Ray reserves for an engine; auto: one, or a part of one if engines outnumber "
        "GPUs",
    )
    num_threads: int | None = Field(
        None, ge=1, description="threads that an engine computes with; null: as many as num_cpus"
    )
    cache_tokens: int | None = Field(
        None, ge=64, description="capacity of an engine's KV cache in tokens; null: by the free memory"
    )
    document_cache: HomePath | None = Field(
        None,
        description="folder in which engines keep the keys and values of documents; null: in memory only",
    )
    document_cache_bytes: int = Field(
        10 << 30, ge=1, description="size of that folder; the longest unused documents are removed first"
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="compile the forward pass before an engine starts: takes about half a minute, then steps "
        "are faster; auto: for models of 50M parameters and more",
    )
    stuck_s: float = Field(
        60, gt=0, description="seconds in one step after which an engine counts as stuck and is replaced"
    )

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas}: is below min_replicas={self.min_replicas}; raise it"
            )
        return self


class AccessConfig(_Group):
    """Access."""

    api_keys_file: HomePath | None = Field(
        None,
        description="file with one API key a line; $PARALLELMIND_API_KEYS holds keys separated by commas",
    )
    cors_origins: list[str] = Field(
        [], description="web origins whose pages may call the server; []: its own pages only"
    )
    allowed_hosts: list[str] = Field(
        [],
        description="host names that requests may use besides addresses, localhost and this machine's name, "
        "such as *.example.com; *: any",
    )

    @field_validator("cors_origins", "allowed_hosts", mode="before")
    @classmethod
    def _parse_text(cls, value: Any) -> Any:
        return parse_yaml(value) if isinstance(value, str) else value


class LogConfig(_Group):
    """Log."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="lowest level that is logged; info: a line for every request"
    )
    log_prompts: bool = Field(False, description="log the bodies of requests at level info")


class AppConfig(GroupedConfig):
    """Application: one base model, its adapters, and how they are served."""

    model: ServedModelConfig
    adapter_sources: AdaptersConfig
    limits: RequestLimits
    replicas: ReplicasConfig
    access: AccessConfig
    log: LogConfig

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if self.model.lora_path and self.model.name == BASE:
            raise ValueError(f"served_name={BASE}: requests name the bare model so; give another served_name")
        for name in self.adapter_sources.adapters:
            if name in (BASE, self.model.name) or ":" in name or "/" in name:
                raise ValueError(
                    f"adapters.{name}: is taken, or has a colon or a slash in it; choose another name"
                )
        return self

    @classmethod
    def of(cls: type[AppT], fields: Mapping[str, Any]) -> AppT:
        """Validate fields. Raises UserError for an unknown or bad one, or if there is nothing to serve."""
        return resolve(cls, dict(fields), source="serving")

    @property
    def names(self) -> list[str]:
        """The models that every request can name."""
        adapters = [f"{BASE}:{name}" for name in self.adapter_sources.adapters]
        return list(dict.fromkeys([self.model.name, BASE, *adapters]))


class NetworkConfig(_Group):
    """Network."""

    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="address to listen on; one that other machines reach, such as 0.0.0.0, needs API keys",
    )
    port: int = Field(8000, ge=1, le=65535, description="port to listen on")
    proxy: Literal["haproxy", "serve"] = Field(
        "haproxy",
        description="haproxy: HAProxy, with patches of private parts of Ray Serve; serve: Serve's own proxy "
        "and no patches, slower, and replicas listen on every network interface",
    )


class ServerConfig(AppConfig):
    """An application on this machine."""

    network: NetworkConfig
