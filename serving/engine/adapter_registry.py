"""Adapters by name: loaded on first use, refreshed in the background, evicted when others need room.

Sources are asked, and adapters fetched and checked, in threads of their own. Work on one adapter waits for
that on no other, apart from the load itself.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import parallelmind as pm
from parallelmind.errors import first_line
from parallelmind.hardware import decided_dtype
from parallelmind.ray_env import MLFLOW_FAIL_FAST_ENV, set_env_defaults
from serving.config import BASE, AppConfig
from serving.engine.adapter_check import check_adapter
from serving.engine.adapter_sources import find_newest, version_name
from serving.engine.loop import lower_priority
from serving.observability.log import log

_MAX_THREADS = 32  # more than the adapters that are looked for at one time
_MAX_FAILURES = 1000  # that are remembered: clients choose the names


class AdapterVersionGoneError(pm.UserError):
    """The adapter version that a sample started with is no longer available."""


class _FailedCheckError(pm.UserError):
    """The adapter failed its check. Loading the same version again would fail too."""


@dataclass(slots=True)
class _LoadedAdapter:
    """A loaded adapter. version: identifies its content.

    failed_version: a newer version that failed its check. last_error: the refresh error that was logged last.
    """

    version: str
    failed_version: str | None = None
    last_error: str | None = None


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why an adapter could not be loaded, and until when that is the answer to further requests."""

    error: Exception
    until: float


class AdapterRegistry:
    """The adapters of one engine. All methods are called from one event loop, which none of them blocks.

    Samples that start after a new version is loaded use it; running samples end with the version that they
    started with.
    """

    def __init__(self, engine: pm.Engine, config: AppConfig) -> None:
        self._engine, self._config, self._sources = engine, config, config.adapter_sources
        self._loaded: OrderedDict[str, _LoadedAdapter] = OrderedDict()  # least recently used first
        self._users: Counter[str] = Counter()  # by loaded name: those that must not be evicted
        self._tasks: dict[str, asyncio.Task[None]] = {}  # one at most works on each adapter
        self._failures: OrderedDict[str, _Failure] = OrderedDict()  # oldest first
        self._threads = ThreadPoolExecutor(_MAX_THREADS, "adapters", initializer=lower_priority)
        set_env_defaults(MLFLOW_FAIL_FAST_ENV)  # requests wait for the answer of the registry

    def num_loaded(self) -> int:
        return len(self._loaded)

    @asynccontextmanager
    async def use(self, model: str, version: str | None = None) -> AsyncIterator[tuple[str | None, str]]:
        """Context with the name in the engine of a model's adapter, and its version.

        The adapter stays loaded within the context. The name is None for the default adapter; the version is
        "" for that and for the base.

        version: the version that the sample started with on another engine.

        A new version that cannot be loaded leaves the loaded one in use. Raises UserError for an unknown
        model and for an adapter that is damaged, too large, has another base or fails its check, and
        AdapterVersionGoneError if `version` is not available any more.
        """
        if model in (self._config.model.name, BASE):
            yield (BASE if model == BASE else None), ""
            return
        name = await self._resolve(model, version)
        self._loaded.move_to_end(name)
        self._users[name] += 1
        try:
            yield name, self._loaded[name].version
        finally:
            self._users[name] -= 1

    async def _resolve(self, model: str, version: str | None) -> str:
        await self._require_loaded(model)
        if version in (None, self._loaded[model].version):
            return model
        await self.refresh(model)  # another engine has seen a version that this one has not
        await self._require_loaded(model)
        if version == self._loaded[model].version:
            return model
        name = await self._in_thread(version_name, self._sources, model, version)
        if name is None:
            raise AdapterVersionGoneError(
                f"model={model!r}: has a new version, and the old one is lost with its engine; "
                "send the request again"
            )
        await self._require_loaded(name)
        return name

    async def _require_loaded(self, model: str) -> None:
        """Load an adapter that is not. Raises what its load has raised, also a short time ago."""
        while model not in self._loaded:
            failure = self._failures.get(model)
            if failure is not None and monotonic() < failure.until:
                raise failure.error.with_traceback(None)
            await self._wait(self._tasks.get(model) or self._begin(model, self._load_newest(model)))

    async def keep_fresh(self) -> None:
        """Look for new versions of the loaded adapters every `refresh_s` seconds, until cancelled."""
        while True:
            await asyncio.sleep(self._sources.refresh_s)
            for model in self._loaded:
                if model not in self._tasks:
                    self._begin(model, self._load_newest(model))

    async def refresh(self, model: str) -> None:
        """Load a new version of a loaded adapter if there is one. An error is logged."""
        await self._wait(self._tasks.get(model) or self._begin(model, self._load_newest(model)))

    def _begin(self, model: str, work: Any) -> asyncio.Task[None]:
        task = self._tasks[model] = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(model))
        return task

    async def _wait(self, task: asyncio.Task[None]) -> None:
        """Wait for a task. A cancelled caller does not cancel it, because other callers may wait for it."""
        await asyncio.shield(task)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    # Work on one adapter, in a task

    async def _load_newest(self, model: str) -> None:
        loaded = self._loaded.get(model)
        try:
            new = await self._in_thread(self._load_in_thread, model, loaded)
        except pm.UserError as error:
            self._note_failure(model, loaded, error)
            return
        except Exception as error:  # it would count as a loss of the engine, and be tried again elsewhere
            if loaded is None:
                log.exception("adapter %r cannot be loaded", model)
            reason = pm.UserError(f"model={model!r}: cannot be loaded ({first_line(error)})")
            self._note_failure(model, loaded, reason)
            return
        if new is not None:
            self._loaded[model] = new
            self._failures.pop(model, None)
            self._evict(model)

    def _note_failure(self, model: str, loaded: _LoadedAdapter | None, error: Exception) -> None:
        if loaded is None:
            self._failures.pop(model, None)
            self._failures[model] = _Failure(error, monotonic() + self._sources.refresh_s)
            if len(self._failures) > _MAX_FAILURES:
                self._failures.popitem(last=False)
        elif str(error) != loaded.last_error:
            log.warning("adapter %r: keeping the loaded version: %s", model, error)
            loaded.last_error = str(error)

    def _load_in_thread(self, model: str, loaded: _LoadedAdapter | None) -> _LoadedAdapter | None:
        """Load the newest version; None if it is loaded already, or has failed its check before."""
        newest = find_newest(self._sources, model)
        if loaded is not None and newest.id in (loaded.version, loaded.failed_version):
            return None
        try:
            with TemporaryDirectory(prefix="pm-adapter-") as scratch_dir:
                self._engine.load_adapter(model, newest.fetch(Path(scratch_dir)), check=self._check)
        except _FailedCheckError:
            if loaded is not None:
                loaded.failed_version = newest.id
            raise
        return _LoadedAdapter(newest.id)

    def _check(self, model: Any) -> None:
        """Raise _FailedCheckError unless cached decoding gives the logits of one forward pass."""
        engine = self._engine
        if engine.fallback_reason or not engine.rope_config.patch_rope:
            return
        dtype = decided_dtype(self._config.model.dtype)
        try:
            check_adapter(model, engine.tokenizer, engine.rope_config, dtype)
        except pm.UserError as error:
            raise _FailedCheckError(str(error)) from error

    def _evict(self, kept: str) -> None:
        """Unload the least recently used adapters that are too many."""
        idle = [model for model in self._loaded if model != kept and not self._users[model]]
        for model in idle[: max(0, len(self._loaded) - self._sources.max_adapters)]:
            if model not in self._tasks:
                del self._loaded[model]
                self._begin(model, self._in_thread(self._engine.unload_adapter, model))
