"""Adapters by name: loaded on first use, refreshed for new versions, evicted when others need room."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import parallelmind as pm
from parallelmind.model.manifest import MANIFEST
from parallelmind.ray_env import MLFLOW_FAIL_FAST_ENV, set_env_defaults
from parallelmind.remote import RemotePath
from serving.config import BASE, REGISTRY, AppConfig
from serving.engine.adapter_check import check_adapter
from serving.observability.log import log


class AdapterVersionGoneError(pm.UserError):
    """The adapter version that a sample started with is no longer available."""


class _FailedCheckError(pm.UserError):
    """The adapter failed its check. Loading the same version again would fail too."""


@dataclass(slots=True)
class _LoadedAdapter:
    """A loaded adapter. version: identifies its content. checked_at: time of the last check for a new one.

    failed_version: a newer version that failed its check. last_error: the refresh error that was logged last.
    """

    version: str
    checked_at: float
    failed_version: str | None = None
    last_error: str | None = None


class AdapterRegistry:
    """The adapters of one engine.

    Samples that start after a new version is loaded use it; running samples end with the version that they
    started with.
    """

    def __init__(self, engine: pm.Engine, config: AppConfig) -> None:
        self._engine, self._config = engine, config
        self._loaded: OrderedDict[str, _LoadedAdapter] = OrderedDict()  # least recently used first
        self._lock = asyncio.Lock()
        set_env_defaults(MLFLOW_FAIL_FAST_ENV)  # requests wait for the answer of the registry

    def num_loaded(self) -> int:
        return len(self._loaded)

    async def resolve(self, model: str, version: str | None = None) -> str | None:
        """Load the adapter of a model if needed and return its name in the engine; None for the default one.

        version: the version that the sample started with on another engine.

        A new version that cannot be loaded leaves the loaded one in use. Raises UserError for an unknown
        model and for an adapter that is damaged, has another base or fails its check, and
        AdapterVersionGoneError if `version` is not available any more.
        """
        if model == self._config.model.name:
            return None
        if model == BASE:
            return BASE
        async with self._lock:
            loaded = self._loaded.get(model)
            if loaded is None:
                await asyncio.to_thread(self._load_newest, model)
            elif monotonic() - loaded.checked_at > self._config.adapter_sources.refresh_s:
                await asyncio.to_thread(self._refresh, model, loaded, version)
            if version is not None and version != self._loaded[model].version:
                model = self._registry_name(model, version)
                await asyncio.to_thread(self._load_newest, model)
            self._loaded.move_to_end(model)
            await asyncio.to_thread(self._evict)
        return model

    def version_of(self, name: str | None) -> str:
        """The loaded version of a name that `resolve` returned; "" for the base and the default adapter."""
        return self._loaded[name].version if name is not None and name in self._loaded else ""

    def _registry_name(self, model: str, version: str) -> str:
        """The name of one version in the model registry. Only a registry keeps old versions."""
        location = self._config.adapter_sources.locate(model) or ""
        if not location.startswith(REGISTRY):
            raise AdapterVersionGoneError(
                f"model={model!r}: has a new version, and the old one is lost with its engine; "
                "send the request again"
            )
        name = location.removeprefix(REGISTRY).partition("@")[0].partition("/")[0]
        return f"{REGISTRY}{name}/{version}"

    def _refresh(self, model: str, loaded: _LoadedAdapter, version: str | None) -> None:
        """Load a new version if there is one.

        An error is logged once and raised only if the request needs a version that is not loaded.
        """
        try:
            self._load_newest(model)
        except (pm.UserError, OSError) as error:
            if version not in (None, loaded.version):
                raise
            if str(error) != loaded.last_error:
                log.warning("adapter %r: keeping the loaded version: %s", model, error)
            loaded.last_error, loaded.checked_at = str(error), monotonic()

    def _load_newest(self, model: str) -> None:
        version, fetch = self._find_newest(model)
        loaded = self._loaded.get(model)
        if loaded is not None and version in (loaded.version, loaded.failed_version):
            loaded.checked_at = monotonic()
            return
        try:
            with TemporaryDirectory(prefix="pm-adapter-") as scratch_dir:
                self._engine.load_adapter(model, fetch(Path(scratch_dir)), check=self._check)
        except _FailedCheckError:
            if loaded is not None:
                loaded.failed_version = version
            raise
        self._loaded[model] = _LoadedAdapter(version, monotonic())

    def _find_newest(self, model: str) -> tuple[str, Callable[[Path], str | Path]]:
        """The newest version, and a function that returns its folder, given a folder to download into."""
        location = self._config.adapter_sources.locate(model)
        if location is None:
            raise pm.UserError(f"model={model!r}: not served here; /v1/models lists the models")
        if location.startswith(REGISTRY):
            from parallelmind import tracking

            uri = self._config.adapter_sources.mlflow_uri or ""
            version, source = tracking.find_model_version(uri, location)
            return version, lambda scratch_dir: tracking.download_artifact(uri, source, scratch_dir)
        manifest = RemotePath.at(location, "model").child(MANIFEST).read_bytes()
        return sha256(manifest).hexdigest() if manifest else "", lambda _: location

    def _check(self, model: Any) -> None:
        """Raise _FailedCheckError unless cached decoding gives the logits of one forward pass."""
        engine = self._engine
        if engine.fallback_reason or not engine.rope_config.patch_rope:
            return
        try:
            check_adapter(model, engine.tokenizer, engine.rope_config, self._config.model.dtype)
        except pm.UserError as error:
            raise _FailedCheckError(str(error)) from error

    def _evict(self) -> None:
        while len(self._loaded) > self._config.adapter_sources.max_adapters:
            model, _ = self._loaded.popitem(last=False)
            self._engine.unload_adapter(model)
