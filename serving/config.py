"""What an application serves and how much it takes on. Text will do for every value: `serve run` knows no
other type.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from os.path import isfile
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, field_validator, model_validator

import parallelmind as pm
from parallelmind.config import Dtype, FrozenConfig, ModelConfig, Visibility, resolve
from parallelmind.config.yaml_file import parse_yaml
from parallelmind.model.manifest import MANIFEST

_ADAPTER = "adapter"  # what a run calls the folder of its adapter
_KEYS = "PARALLELMIND_API_KEYS"
HOST = "127.0.0.1"
BASE, REGISTRY = "base", "models:/"
_FOLDER = re.compile(r"\w[\w.-]{0,99}")  # one name: no way out of the root

AppT = TypeVar("AppT", bound="AppConfig")


class Limits(FrozenConfig):
    """What one request may ask for, and how many there may be. Each process in front counts for itself."""

    model_config = ConfigDict(strict=False)

    max_requests: int = Field(128, ge=1, description="open requests; more are answered 429 at once")
    max_branches: int = Field(64, ge=1, le=256, description="branches of one sample, n included")
    max_prompt_tokens: int = Field(
        8192, ge=1, description="prompt tokens of one sample, all branches together"
    )
    max_new_tokens: int = Field(4096, ge=1, description="new tokens of one branch")
    max_body_bytes: int = Field(1 << 20, ge=1024, description="bytes of a request's body")
    max_header_bytes: int = Field(16 << 10, ge=1024, description="bytes of a request's headers")
    timeout_s: float = Field(600, gt=0, description="seconds that one request may take")
    slow_client_s: float = Field(
        30, gt=0, description="seconds that a client may keep us waiting, for its body or to read"
    )


class AppConfig(Limits):
    """One base model, the adapters on it, and how it is served."""

    lora_path: str | None = Field(
        None, min_length=1, description="adapter folder; null: the base model alone"
    )
    base_model: str | None = Field(
        None, min_length=1, description="smollm2-135m, a folder, or a hub id; null: the adapter's"
    )
    served_name: str | None = Field(
        None, min_length=1, description="model name in requests; null: the run's or the base model's"
    )
    dtype: Dtype = Field("float32", description="type to compute in")
    rope_2d_ratio: float | None = Field(
        None, ge=0, le=1, description="share of rotary pairs that pos2d drives; null: as trained"
    )
    visibility: Visibility | None = Field(
        None, description="what branches see of each other; null: as trained"
    )
    trust_remote_code: bool = Field(False, description="allow a hub model to run its own code")
    adapters: dict[str, str] = Field(
        {}, description="further adapters by name: a folder, or models:/NAME@ALIAS"
    )
    adapter_root: str | None = Field(
        None, description="requests may name any adapter folder in here, as base:NAME"
    )
    mlflow_uri: str | None = Field(
        None, description="registry that models:/ names are looked up in; requests may give them too"
    )
    max_adapters: int = Field(
        8, ge=1, description="adapters that an engine keeps loaded; the one used least lately goes"
    )
    refresh_s: float = Field(
        10, ge=0, description="seconds before an adapter is looked at again for a new version"
    )
    min_replicas: int = Field(1, ge=0, description="fewest engines")
    max_replicas: int = Field(1, ge=1, description="most engines")
    branches_per_replica: float = Field(
        16, gt=0, description="live branches, and waiting ones, that call for one engine"
    )
    idle_s: float = Field(60, ge=0, description="seconds of less load before an engine goes")
    num_cpus: float = Field(0.5, ge=0, description="CPUs that Ray reserves for an engine")
    num_gpus: float = Field(0, ge=0, description="GPUs of an engine")
    num_threads: int | None = Field(
        None, ge=1, description="threads that an engine computes with; null: the machine's share"
    )
    cache_tokens: int | None = Field(
        None, ge=64, description="tokens of keys and values that an engine keeps; null: by memory"
    )
    stuck_s: float = Field(
        60, gt=0, description="seconds in one step after which an engine counts as stuck and is replaced"
    )
    api_keys_file: str | None = Field(
        None, description="file with one key a line; $PARALLELMIND_API_KEYS has them with commas"
    )
    cors_origins: list[str] = Field(
        [], description="web origins that may call from a browser; []: this server's pages alone"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="info: a line for every request"
    )
    log_prompts: bool = Field(False, description="write what requests ask into the log, at level info")

    @field_validator("adapters", "cors_origins", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """Text is YAML."""
        return parse_yaml(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.lora_path is None and self.base_model is None:
            raise ValueError(
                "lora_path: required and not given; add lora_path=runs/NAME-HASH/adapter or base_model=smollm2-135m"
            )
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas}: is below min_replicas={self.min_replicas}; raise it"
            )
        for name in self.adapters:
            if name in (BASE, self.name) or ":" in name or "/" in name:
                raise ValueError(
                    f"adapters.{name}: is taken, or has a colon or a slash in it; choose another name"
                )
        return self

    @classmethod
    def of(cls: type[AppT], given: Mapping[str, Any]) -> AppT:
        """Raises UserError for an unknown field, a bad value, and nothing to serve."""
        return resolve(cls, dict(given), source="serving")

    @property
    def name(self) -> str:
        """What `model` in a request must be; never a path of this machine."""
        if self.served_name:
            return self.served_name
        path = Path(self.lora_path or self.base_model or "")
        if self.lora_path:
            path = path if path.name else path.absolute()  # "." has no name
            return path.parent.name if path.name == _ADAPTER and path.parent.name else path.name
        return path.name if path.is_absolute() else str(path)

    @property
    def names(self) -> list[str]:
        """Models that a request can always ask for."""
        return list(dict.fromkeys([self.name, BASE, *(f"{BASE}:{name}" for name in self.adapters)]))

    def locate(self, model: str) -> str | None:
        """Where the adapter of this name is, a folder or models:/…; None if there is no such name."""
        if model.startswith(REGISTRY):
            return model if self.mlflow_uri else None
        name = model.removeprefix(f"{BASE}:")
        if name in self.adapters:
            return self.adapters[name]
        if self.adapter_root is None or not _FOLDER.fullmatch(name):
            return None
        folder = Path(self.adapter_root) / name
        found = [
            each for each in (folder / _ADAPTER, folder) if isfile(each / MANIFEST)
        ]  # Path.is_file raises for long names
        return str(found[0]) if found else None

    def api_keys(self) -> list[str]:
        """None at all lets everybody in. Raises UserError for a file that cannot be read, and for no key
        where one should be.
        """
        given, path = os.environ.get(_KEYS), self.api_keys_file
        found = (given or "").split(",")
        if path is not None:
            try:
                found += Path(path).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise pm.UserError(
                    f"api_keys_file={path}: {error}; give a text file with one key a line"
                ) from error
        keys = [key.strip() for key in found if key.strip()]
        if not keys and (path is not None or given is not None):
            place, remedy = (
                (f"${_KEYS}={given!r}", "unset it")
                if path is None
                else (f"api_keys_file={path}", "leave it out")
            )
            raise pm.UserError(f"{place}: holds no key; add one, or {remedy} to let everybody in")
        return keys

    def load(self) -> tuple[Any, Any]:
        """Model and tokenizer, on the GPU that an engine is given, if any. Raises UserError for what cannot
        be loaded.
        """
        from parallelmind.model.structure import to_gpu

        rope: dict[str, Any] = {"rope_2d_ratio": self.rope_2d_ratio, "visibility": self.visibility}
        model, tokenizer = pm.load_model_with_lora(
            self.base_model,
            self.lora_path,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            **{field: value for field, value in rope.items() if value is not None},
        )
        return to_gpu(model) if self.num_gpus else model, tokenizer

    def load_tokenizer(self) -> Any:
        """The tokenizer alone. Raises UserError for one that cannot be loaded."""
        from parallelmind.model.base_model import load_tokenizer

        return load_tokenizer(self._base())

    def context(self) -> int | None:
        """Most positions that the model was made for. Raises UserError for a model that cannot be loaded."""
        from parallelmind.model.base_model import load_base_config

        return getattr(load_base_config(self._base()).get_text_config(), "max_position_embeddings", None)

    def _base(self) -> ModelConfig:
        from parallelmind.model.manifest import read_adapter

        base = self.base_model or read_adapter(self.lora_path or "").base_model
        return ModelConfig(base_model=base, trust_remote_code=self.trust_remote_code)


class ServerConfig(AppConfig):
    """An application and where it listens."""

    port: int = Field(8000, ge=1, le=65535, description=f"port on {HOST}")
