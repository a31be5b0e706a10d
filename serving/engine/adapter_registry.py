"""Adapters by name: loaded when first asked for, watched for new versions, and put away when others need the
room.
"""

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


class AdapterVersionGone(pm.UserError):
    """A sample cannot go on with the version that it has begun with."""


class _Unfit(pm.UserError):
    """A version that would be refused another time as well."""


@dataclass(slots=True)
class _Loaded:
    """stamp: what tells one version of an adapter from another. looked: when it was last compared.

    unfit: the stamp of a newer one that is refused. told: why, as the log has it.
    """

    stamp: str
    looked: float
    unfit: str | None = None
    told: str | None = None


class AdapterRegistry:
    """The adapters of one engine. A new version serves the samples that begin after it; others end with
    theirs.
    """

    def __init__(self, engine: pm.Engine, config: AppConfig) -> None:
        self._engine, self._config = engine, config
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()  # least lately used first
        self._turn = asyncio.Lock()
        set_env_defaults(MLFLOW_FAIL_FAST_ENV)  # everybody who wants an adapter waits for the registry

    def loaded(self) -> int:
        return len(self._loaded)

    async def ready(self, model: str, version: str | None = None) -> str | None:
        """The name that the engine knows this model by, once it is loaded.

        version: what a sample has begun with elsewhere. Raises UserError for an unknown model, and for an
        adapter that is damaged, of another base, or decodes other than it was trained; Replaced if that
        version is not to be had any more. What is wrong with a new version leaves the one that is loaded at
        work.
        """
        if model == self._config.name:
            return None
        if model == BASE:
            return BASE
        async with self._turn:
            known = self._loaded.get(model)
            if known is None:
                await asyncio.to_thread(self._refresh, model)
            elif monotonic() - known.looked > self._config.refresh_s:
                await asyncio.to_thread(self._look_again, model, known, version)
            if version is not None and version != self._loaded[model].stamp:
                model = self._pinned(model, version)
                await asyncio.to_thread(self._refresh, model)
            self._loaded.move_to_end(model)
            await asyncio.to_thread(self._make_room)
        return model

    def version(self, name: str | None) -> str:
        """Which one a name stands for now, as `ready` has given it."""
        return self._loaded[name].stamp if name is not None and name in self._loaded else ""

    def _pinned(self, model: str, version: str) -> str:
        """By which name the registry still has a version that the model's own name does not mean any more."""
        where = self._config.locate(model) or ""
        if not where.startswith(REGISTRY):
            raise AdapterVersionGone(
                f"model={model!r}: has a new version, and the old one is gone with its engine; ask again"
            )
        name = where.removeprefix(REGISTRY).partition("@")[0].partition("/")[0]
        return f"{REGISTRY}{name}/{version}"

    def _look_again(self, model: str, known: _Loaded, version: str | None) -> None:
        """Load a new version, if there is one that can be had. Raises UserError for none only if it is asked
        for by name.
        """
        try:
            self._refresh(model)
        except (pm.UserError, OSError) as error:
            if version not in (None, known.stamp):
                raise
            if str(error) != known.told:
                log.warning("adapter %r stays at the version that is loaded: %s", model, error)
            known.told, known.looked = str(error), monotonic()

    def _refresh(self, model: str) -> None:
        stamp, fetch = self._find(model)
        known = self._loaded.get(model)
        if known is not None and stamp in (known.stamp, known.unfit):
            known.looked = monotonic()
            return
        try:
            with TemporaryDirectory(prefix="pm-adapter-") as scratch:
                self._engine.load_adapter(model, fetch(Path(scratch)), check=self._check)
        except _Unfit:
            if known is not None:
                known.unfit = stamp
            raise
        self._loaded[model] = _Loaded(stamp, monotonic())

    def _find(self, model: str) -> tuple[str, Callable[[Path], str | Path]]:
        """What tells this version from others, and how to get its folder, given one for what has to be
        fetched.
        """
        where = self._config.locate(model)
        if where is None:
            raise pm.UserError(f"model={model!r}: not served here; /v1/models lists what is")
        if where.startswith(REGISTRY):
            from parallelmind import tracking

            uri = self._config.mlflow_uri or ""
            version, source = tracking.find_model_version(uri, where)
            return version, lambda scratch: tracking.download_artifact(uri, source, scratch)
        note = RemotePath.at(where, "model").child(MANIFEST).read_bytes()
        return sha256(note).hexdigest() if note else "", lambda _: where

    def _check(self, model: Any) -> None:
        """Raise _Unfit unless cached decoding gives the logits of one forward pass."""
        engine = self._engine
        if engine.fallback_reason or not engine.rope_config.patch_rope:
            return
        try:
            check_adapter(model, engine.tokenizer, engine.rope_config, self._config.dtype)
        except pm.UserError as error:
            raise _Unfit(str(error)) from error

    def _make_room(self) -> None:
        while len(self._loaded) > self._config.max_adapters:
            model, _ = self._loaded.popitem(last=False)
            self._engine.unload_adapter(model)
