"""Adapters are loaded on first use, evicted when others need room, and replaced while requests run."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from engines import (
    ISOLATED,
    decode,
    run_to_end,
    save_random_adapter,
    saved_adapters,
    tiny_engine,
    tokens_by_branch,
)

from parallelmind import tracking
from parallelmind.config import FrozenConfig, ModelConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.model_runner import ModelRunner
from parallelmind.engine.request import Sample
from parallelmind.errors import UserError
from serving.config import AppConfig
from serving.engine import adapter_registry
from serving.engine.adapter_registry import AdapterRegistry, AdapterVersionGoneError
from serving.engine.adapter_sources import AdapterVersion
from serving.observability.log import log

SAMPLE = Sample(list(range(50, 90)), [[5, 6, 7], [8]])
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved_adapters(tmp_path_factory.mktemp("adapters"))


def make_registry(engine: Engine, folders: list[Path], **fields: Any) -> AdapterRegistry:
    return AdapterRegistry(
        engine, AppConfig.of({"base_model": str(folders[0].parent / "base"), "refresh_s": 0.001, **fields})
    )


def resolve(registry: AdapterRegistry, model: str, version: str | None = None) -> str | None:
    return used(registry, model, version)[0]


def used(registry: AdapterRegistry, model: str, version: str | None = None) -> tuple[str | None, str]:
    """The name in the engine and the version that a sample of this model would use."""

    async def use() -> tuple[str | None, str]:
        async with registry.use(model, version) as adapter:
            pass
        await asyncio.gather(*registry._tasks.values())
        return adapter

    return asyncio.run(use())


def refreshed(registry: AdapterRegistry, model: str) -> str | None:
    """As `resolve`, after the background has looked for a new version."""

    async def refresh() -> None:
        await registry.refresh(model)
        await asyncio.gather(*registry._tasks.values())

    asyncio.run(refresh())
    return resolve(registry, model)


def adapter_names(folders: list[Path]) -> dict[str, str]:
    return {"one": str(folders[0]), "two": str(folders[1])}


def test_an_adapter_is_loaded_on_first_use(folders: list[Path]) -> None:
    engine = tiny_engine(ISOLATED)
    registry = make_registry(engine, folders, adapters=adapter_names(folders))
    base = decode(engine, SAMPLE, **SETTINGS)
    assert registry.num_loaded() == 0
    one, two = (
        decode(engine, SAMPLE, adapter=resolve(registry, f"base:{name}"), **SETTINGS)
        for name in adapter_names(folders)
    )
    assert len({str(answer) for answer in (base, one, two)}) == 3
    assert decode(engine, SAMPLE, adapter=resolve(registry, "base"), **SETTINGS) == base


def test_the_least_recently_used_adapter_is_evicted(folders: list[Path]) -> None:
    engine = tiny_engine(ISOLATED)
    registry = make_registry(engine, folders, adapters=adapter_names(folders), max_adapters=1)
    one = resolve(registry, "one")
    number = engine.submit(SAMPLE, adapter=one, **SETTINGS)
    engine.step()
    resolve(registry, "two")
    assert registry.num_loaded() == 1
    with pytest.raises(UserError, match="not loaded"):
        engine.submit(SAMPLE, adapter=one, **SETTINGS)
    tokens = tokens_by_branch(run_to_end(engine))
    assert (
        tokens[number, 0] == decode(engine, SAMPLE, adapter=resolve(registry, "one"), **SETTINGS)[0][1:]
    )  # it went on


def test_a_new_version_serves_samples_that_start_after_it(folders: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "live"
    shutil.copytree(folders[0], folder)
    engine = tiny_engine(ISOLATED)
    registry = make_registry(engine, folders, adapter_root=str(tmp_path))
    before = decode(engine, SAMPLE, adapter=resolve(registry, "base:live"), **SETTINGS)
    number = engine.submit(SAMPLE, adapter=resolve(registry, "base:live"), **SETTINGS)
    first = tokens_by_branch(engine.step())
    save_random_adapter(folder, ModelConfig(base_model=str(folders[0].parent / "base")), seed=1)
    after = engine.submit(SAMPLE, adapter=refreshed(registry, "base:live"), **SETTINGS)
    tokens = tokens_by_branch(run_to_end(engine))
    assert [first[number, branch] + tokens[number, branch] for branch in range(2)] == before
    assert [tokens[after, branch] for branch in range(2)] == decode(
        engine_with_adapter(folders[1]), SAMPLE, adapter="x", **SETTINGS
    )


def engine_with_adapter(folder: Path) -> Engine:
    engine = tiny_engine(ISOLATED)
    engine.load_adapter("x", folder)
    return engine


def test_an_adapter_that_fails_its_check_is_refused(folders: list[Path], monkeypatch: Any) -> None:
    engine = tiny_engine(ISOLATED)
    registry = make_registry(engine, folders, adapters=adapter_names(folders))
    resolve(registry, "one")
    call = ModelRunner.__call__
    monkeypatch.setattr(ModelRunner, "__call__", lambda *args: call(*args) * 1.01)  # as a wrong cache would
    with pytest.raises(
        UserError, match="model: the adapter is refused: the logits of cached decoding differ"
    ):
        resolve(registry, "two")
    monkeypatch.undo()
    assert registry.num_loaded() == 1
    assert decode(engine, SAMPLE, adapter=resolve(registry, "one"), **SETTINGS)


def test_a_file_that_cannot_be_read_is_told_as_an_error_of_the_request(
    folders: list[Path], monkeypatch: Any
) -> None:
    def fail(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied", "parallelmind.json")

    registry = make_registry(tiny_engine(ISOLATED), folders, adapters=adapter_names(folders))
    monkeypatch.setattr(adapter_registry, "find_newest", fail)
    with pytest.raises(UserError, match=r"^model='one': cannot be loaded \(.*Permission denied"):
        resolve(registry, "one")


@pytest.mark.parametrize("name", ["base:none", "other", "models:/demo@champion", "base:../0", ""])
def test_a_model_that_is_not_served_is_refused(folders: list[Path], name: str) -> None:
    registry = make_registry(
        tiny_engine(ISOLATED),
        folders,
        adapters=adapter_names(folders),
        adapter_root=str(folders[0].parent / "base"),
    )
    with pytest.raises(UserError, match="not served here"):
        resolve(registry, name)


def test_a_damaged_version_leaves_the_old_one_in_use(
    folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "handlers", [caplog.handler])  # another test may have configured it
    monkeypatch.setattr(log, "propagate", False)
    caplog.set_level("WARNING", logger=log.name)
    folder = tmp_path / "live"
    shutil.copytree(folders[0], folder)
    engine = tiny_engine(ISOLATED)
    registry = make_registry(engine, folders, adapter_root=str(tmp_path))
    before = decode(engine, SAMPLE, adapter=resolve(registry, "live"), **SETTINGS)
    started_version = used(registry, "live")[1]
    (folder / "parallelmind.json").write_text("{")
    for version in (None, started_version, None):
        refreshed(registry, "live")
        assert decode(engine, SAMPLE, adapter=resolve(registry, "live", version), **SETTINGS) == before
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["adapter 'live'"]
    with pytest.raises(UserError):
        resolve(registry, "live", "another")
    shutil.rmtree(folder)
    shutil.copytree(folders[1], folder)
    assert decode(engine, SAMPLE, adapter=refreshed(registry, "live"), **SETTINGS) != before


def test_a_version_that_failed_its_check_is_not_loaded_again(
    folders: list[Path], tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / "live"
    shutil.copytree(folders[0], folder)
    engine = tiny_engine(ISOLATED)
    registry = make_registry(engine, folders, adapter_root=str(tmp_path))
    before = decode(engine, SAMPLE, adapter=resolve(registry, "live"), **SETTINGS)
    shutil.rmtree(folder)
    shutil.copytree(folders[1], folder)
    loads, load, call = [], engine.load_adapter, ModelRunner.__call__
    monkeypatch.setattr(
        engine, "load_adapter", lambda *args, **kwargs: (loads.append(args), load(*args, **kwargs))
    )
    with monkeypatch.context() as wrong:
        wrong.setattr(ModelRunner, "__call__", lambda *args: call(*args) * 1.01)
        assert [refreshed(registry, "live") for _ in range(3)] == ["live"] * 3
    assert len(loads) == 1
    assert decode(engine, SAMPLE, adapter="live", **SETTINGS) == before


class SlowSource:
    """Stands for `find_newest` where the source of one model does not answer until `answers`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
        self._find, self._slow = adapter_registry.find_newest, slow
        self.asked, self.answers, self.times = Event(), Event(), 0
        self.error: Exception | None = None
        monkeypatch.setattr(adapter_registry, "find_newest", self)

    def __call__(self, config: Any, model: str) -> AdapterVersion:
        if model == self._slow:
            self.times += 1
            self.asked.set()
            assert self.answers.wait(60)
            if self.error is not None:
                raise self.error
        return self._find(config, model)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def name_of(registry: AdapterRegistry, model: str) -> str | None:
    async with registry.use(model) as (name, _):
        return name


def test_a_source_that_does_not_answer_delays_nobody_who_uses_another_adapter(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make_registry(tiny_engine(ISOLATED), folders, adapters=adapter_names(folders))

    async def run() -> None:
        source = SlowSource(monkeypatch, "one")
        waiting = [asyncio.ensure_future(name_of(registry, "one")) for _ in range(40)]
        await until(source.asked.is_set)
        assert await name_of(registry, "two") == "two"
        waiting.pop().cancel()  # a client leaves; the others wait on
        assert not any(task.done() for task in waiting)
        source.answers.set()
        assert await asyncio.gather(*waiting) == ["one"] * 39
        assert source.times == 1

    asyncio.run(run())


def test_a_loaded_adapter_is_used_while_its_source_does_not_answer(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make_registry(tiny_engine(ISOLATED), folders, adapters=adapter_names(folders))

    async def run() -> None:
        await name_of(registry, "one")
        source = SlowSource(monkeypatch, "one")
        refreshing = asyncio.ensure_future(registry.keep_fresh())
        await until(source.asked.is_set)
        assert [await name_of(registry, "one") for _ in range(3)] == ["one"] * 3
        source.error = UserError("model: the registry is gone")
        source.answers.set()
        await until(lambda: source.times > 2)  # it is asked again and again
        assert await name_of(registry, "one") == "one"
        refreshing.cancel()

    asyncio.run(run())


def test_an_adapter_that_cannot_be_loaded_is_not_tried_again_for_a_while(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make_registry(tiny_engine(ISOLATED), folders, adapters=adapter_names(folders), refresh_s=1000)

    async def run() -> None:
        source = SlowSource(monkeypatch, "one")
        source.error = UserError("model='one': is damaged")
        source.answers.set()
        for _ in range(3):
            with pytest.raises(UserError, match="is damaged"):
                await name_of(registry, "one")
        assert source.times == 1
        source.error = None
        registry._failures.clear()  # as after refresh_s seconds
        assert await name_of(registry, "one") == "one"

    asyncio.run(run())


def test_an_adapter_in_use_is_not_evicted(folders: list[Path]) -> None:
    engine = tiny_engine(ISOLATED)
    registry = make_registry(engine, folders, adapters=adapter_names(folders), max_adapters=1)

    async def run() -> None:
        async with registry.use("one") as (one, _):
            await name_of(registry, "two")
            engine.cancel(engine.submit(SAMPLE, adapter=one, **SETTINGS))
        assert registry.num_loaded() == 2
        async with registry.use("one"), registry.use("two"):
            pass

    asyncio.run(run())


def test_an_adapter_that_is_too_large_is_refused_before_it_is_read(folders: list[Path]) -> None:
    registry = make_registry(
        tiny_engine(ISOLATED), folders, adapters=adapter_names(folders), max_adapter_bytes=1000
    )
    with pytest.raises(UserError, match=r"model='one': its adapter has \d+ bytes, 1000 allowed"):
        resolve(registry, "one")


@pytest.mark.parametrize("name", ["models:/other@champion", "models:/other/1"])
def test_only_listed_models_of_the_registry_are_served(folders: list[Path], name: str) -> None:
    registry = make_registry(
        tiny_engine(ISOLATED), folders, mlflow_uri="http://127.0.0.1:9", registry_models="[demo]"
    )
    with pytest.raises(UserError, match="not served here"):
        resolve(registry, name)


def test_a_sample_is_not_resumed_with_another_version_of_a_folder(
    folders: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "live"
    shutil.copytree(folders[0], folder)
    registry = make_registry(tiny_engine(ISOLATED), folders, adapter_root=str(tmp_path))
    started_version = used(registry, "base:live")[1]
    assert resolve(registry, "base:live", started_version) == "base:live"
    save_random_adapter(folder, ModelConfig(base_model=str(folders[0].parent / "base")), seed=1)
    assert resolve(registry, "base:live", started_version) == "base:live"  # it is still loaded
    refreshed(registry, "base:live")
    with pytest.raises(AdapterVersionGoneError, match="model='base:live': has a new version"):
        resolve(registry, "base:live", started_version)
    assert used(registry, "base", "") == ("base", "")


class EmptyConfig(FrozenConfig):
    """The configuration of a run without settings."""


def test_the_model_registry_resolves_aliases_to_versions(
    folders: list[Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = tracking.absolute_uri("sqlite:///mlflow.db")
    for number, folder in enumerate(folders):
        run_of = tracking.Tracker.start(uri, "test", f"run{number}", EmptyConfig(), key=str(number))
        run_of.log_folder(folder, "adapter")
        tracking.register_model(
            uri, run_of.run_id, "adapter", "demo", "champion" if number == 0 else "challenger"
        )
    engine = tiny_engine(ISOLATED)
    registry = make_registry(engine, folders, mlflow_uri=uri)
    expected = [decode(engine_with_adapter(folder), SAMPLE, adapter="x", **SETTINGS) for folder in folders]
    assert (
        decode(engine, SAMPLE, adapter=resolve(registry, "models:/demo@champion"), **SETTINGS) == expected[0]
    )
    assert decode(engine, SAMPLE, adapter=resolve(registry, "models:/demo/2"), **SETTINGS) == expected[1]
    tracking.MlflowClient(uri).set_registered_model_alias("demo", "champion", "2")
    assert (
        decode(engine, SAMPLE, adapter=refreshed(registry, "models:/demo@champion"), **SETTINGS)
        == expected[1]
    )
    # By a sample that has started with it on another engine.
    moved = used(registry, "models:/demo@champion", version="1")
    assert moved == ("models:/demo/1", "1")
    assert decode(engine, SAMPLE, adapter=moved[0], **SETTINGS) == expected[0]
    with pytest.raises(UserError, match="model='models:/demo@nobody': not in the registry"):
        resolve(registry, "models:/demo@nobody")
