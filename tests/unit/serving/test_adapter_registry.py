"""Adapters are loaded on first use, evicted when others need room, and replaced while requests run."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from time import monotonic
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
from serving.engine.adapter_registry import AdapterRegistry, AdapterVersionGoneError
from serving.observability.log import log

SAMPLE = Sample(list(range(50, 90)), [[5, 6, 7], [8]])
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved_adapters(tmp_path_factory.mktemp("adapters"))


def make_registry(engine: Engine, folders: list[Path], **fields: Any) -> AdapterRegistry:
    return AdapterRegistry(
        engine, AppConfig.of({"base_model": str(folders[0].parent / "base"), "refresh_s": 0, **fields})
    )


def resolve(registry: AdapterRegistry, model: str, version: str | None = None) -> str | None:
    return asyncio.run(registry.resolve(model, version))


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
    after = engine.submit(SAMPLE, adapter=resolve(registry, "base:live"), **SETTINGS)
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
    monkeypatch.setattr(
        ModelRunner, "__call__", lambda self, step: call(self, step) * 1.01
    )  # as a wrong cache would
    with pytest.raises(
        UserError, match="model: the adapter is refused: the logits of cached decoding differ"
    ):
        resolve(registry, "two")
    monkeypatch.undo()
    assert registry.num_loaded() == 1
    assert decode(engine, SAMPLE, adapter=resolve(registry, "one"), **SETTINGS)


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
    started_version = registry.version_of("live")
    (folder / "parallelmind.json").write_text("{")
    for version in (None, started_version, None):
        assert decode(engine, SAMPLE, adapter=resolve(registry, "live", version), **SETTINGS) == before
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["adapter 'live'"]
    with pytest.raises(UserError):
        resolve(registry, "live", "another")
    shutil.rmtree(folder)
    shutil.copytree(folders[1], folder)
    assert decode(engine, SAMPLE, adapter=resolve(registry, "live"), **SETTINGS) != before


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
        wrong.setattr(ModelRunner, "__call__", lambda self, step: call(self, step) * 1.01)
        assert [resolve(registry, "live") for _ in range(3)] == ["live"] * 3
    assert len(loads) == 1
    assert decode(engine, SAMPLE, adapter="live", **SETTINGS) == before


def test_an_unreachable_registry_leaves_loaded_adapters_in_use(
    folders: list[Path], tmp_path: Path, monkeypatch: Any
) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "")  # to be as it was afterwards
        monkeypatch.delenv(name)
    registry = make_registry(tiny_engine(ISOLATED), folders, mlflow_uri="http://127.0.0.1:9", refresh_s=0.5)
    find = AdapterRegistry._find_newest
    monkeypatch.setattr(AdapterRegistry, "_find_newest", lambda *_: ("1", lambda _: folders[0]))
    resolve(registry, "models:/demo@champion")
    monkeypatch.setattr(AdapterRegistry, "_find_newest", find)
    began = monotonic()
    registry._loaded["models:/demo@champion"].checked_at = 0.0
    for _ in range(100):  # all but the first within refresh_s
        assert resolve(registry, "models:/demo@champion") == "models:/demo@champion"
    assert monotonic() - began < 20


def test_a_sample_is_not_resumed_with_another_version_of_a_folder(
    folders: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "live"
    shutil.copytree(folders[0], folder)
    registry = make_registry(tiny_engine(ISOLATED), folders, adapter_root=str(tmp_path))
    started_version = registry.version_of(resolve(registry, "base:live"))
    assert resolve(registry, "base:live", started_version) == "base:live"
    save_random_adapter(folder, ModelConfig(base_model=str(folders[0].parent / "base")), seed=1)
    with pytest.raises(AdapterVersionGoneError, match="model='base:live': has a new version"):
        resolve(registry, "base:live", started_version)
    assert [registry.version_of(resolve(registry, name, "")) for name in ("base", "base")] == ["", ""]


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
        decode(engine, SAMPLE, adapter=resolve(registry, "models:/demo@champion"), **SETTINGS) == expected[1]
    )
    moved = resolve(
        registry, "models:/demo@champion", version="1"
    )  # by a sample that had started_version with it on another engine
    assert (moved, registry.version_of(moved)) == ("models:/demo/1", "1")
    assert decode(engine, SAMPLE, adapter=moved, **SETTINGS) == expected[0]
    with pytest.raises(UserError, match="model='models:/demo@nobody': not in the registry"):
        resolve(registry, "models:/demo@nobody")
