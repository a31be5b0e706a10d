"""Adapters by name: loaded when asked for, put away when others need the room, replaced while requests go
on.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from engines import ISOLATED, answers, run, said, save_random_adapter, saved_adapters, tiny_engine

from parallelmind import tracking
from parallelmind.config import FrozenConfig, ModelConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.model_runner import ModelRunner
from parallelmind.engine.request import Sample
from parallelmind.errors import UserError
from serving.config import AppConfig
from serving.engine.adapter_registry import AdapterRegistry, AdapterVersionGone
from serving.observability.log import log

SAMPLE = Sample(list(range(50, 90)), [[5, 6, 7], [8]])
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved_adapters(tmp_path_factory.mktemp("adapters"))


def shelf(engine: Engine, folders: list[Path], **fields: Any) -> AdapterRegistry:
    return AdapterRegistry(
        engine, AppConfig.of({"base_model": str(folders[0].parent / "base"), "refresh_s": 0, **fields})
    )


def ready(found: AdapterRegistry, model: str, version: str | None = None) -> str | None:
    return asyncio.run(found.ready(model, version))


def names(folders: list[Path]) -> dict[str, str]:
    return {"one": str(folders[0]), "two": str(folders[1])}


def test_an_adapter_is_loaded_when_it_is_first_asked_for(folders: list[Path]) -> None:
    engine = tiny_engine(ISOLATED)
    found = shelf(engine, folders, adapters=names(folders))
    base = answers(engine, SAMPLE, **SETTINGS)
    assert found.loaded() == 0
    one, two = (
        answers(engine, SAMPLE, adapter=ready(found, f"base:{name}"), **SETTINGS) for name in names(folders)
    )
    assert len({str(each) for each in (base, one, two)}) == 3
    assert answers(engine, SAMPLE, adapter=ready(found, "base"), **SETTINGS) == base


def test_the_adapter_that_is_used_least_lately_makes_room(folders: list[Path]) -> None:
    engine = tiny_engine(ISOLATED)
    found = shelf(engine, folders, adapters=names(folders), max_adapters=1)
    one = ready(found, "one")
    number = engine.submit(SAMPLE, adapter=one, **SETTINGS)
    engine.step()
    ready(found, "two")
    assert found.loaded() == 1
    with pytest.raises(UserError, match="not loaded"):
        engine.submit(SAMPLE, adapter=one, **SETTINGS)
    tokens = said(run(engine))
    assert (
        tokens[number, 0] == answers(engine, SAMPLE, adapter=ready(found, "one"), **SETTINGS)[0][1:]
    )  # it went on


def test_a_new_version_serves_what_begins_after_it(folders: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "live"
    shutil.copytree(folders[0], folder)
    engine = tiny_engine(ISOLATED)
    found = shelf(engine, folders, adapter_root=str(tmp_path))
    before = answers(engine, SAMPLE, adapter=ready(found, "base:live"), **SETTINGS)
    number = engine.submit(SAMPLE, adapter=ready(found, "base:live"), **SETTINGS)
    first = said(engine.step())
    save_random_adapter(folder, ModelConfig(base_model=str(folders[0].parent / "base")), seed=1)
    after = engine.submit(SAMPLE, adapter=ready(found, "base:live"), **SETTINGS)
    tokens = said(run(engine))
    assert [first[number, branch] + tokens[number, branch] for branch in range(2)] == before
    assert [tokens[after, branch] for branch in range(2)] == answers(
        tiny_with(folders[1]), SAMPLE, adapter="x", **SETTINGS
    )


def tiny_with(folder: Path) -> Engine:
    engine = tiny_engine(ISOLATED)
    engine.load_adapter("x", folder)
    return engine


def test_an_adapter_that_decodes_other_than_it_was_trained_is_refused(
    folders: list[Path], monkeypatch: Any
) -> None:
    engine = tiny_engine(ISOLATED)
    found = shelf(engine, folders, adapters=names(folders))
    ready(found, "one")
    call = ModelRunner.__call__
    monkeypatch.setattr(
        ModelRunner, "__call__", lambda self, step: call(self, step) * 1.01
    )  # as a wrong cache would
    with pytest.raises(
        UserError, match="model: the adapter is refused: the logits of cached decoding differ"
    ):
        ready(found, "two")
    monkeypatch.undo()
    assert found.loaded() == 1
    assert answers(engine, SAMPLE, adapter=ready(found, "one"), **SETTINGS)


@pytest.mark.parametrize("name", ["base:none", "other", "models:/demo@champion", "base:../0", ""])
def test_what_is_not_served_is_refused(folders: list[Path], name: str) -> None:
    found = shelf(
        tiny_engine(ISOLATED), folders, adapters=names(folders), adapter_root=str(folders[0].parent / "base")
    )
    with pytest.raises(UserError, match="not served here"):
        ready(found, name)


def test_a_damaged_version_leaves_the_old_one_at_work_until_it_is_mended(
    folders: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "handlers", [caplog.handler])  # a front of another test may have set it up
    monkeypatch.setattr(log, "propagate", False)
    caplog.set_level("WARNING", logger=log.name)
    folder = tmp_path / "live"
    shutil.copytree(folders[0], folder)
    engine = tiny_engine(ISOLATED)
    found = shelf(engine, folders, adapter_root=str(tmp_path))
    before = answers(engine, SAMPLE, adapter=ready(found, "live"), **SETTINGS)
    begun = found.version("live")
    (folder / "parallelmind.json").write_text("{")
    for version in (None, begun, None):
        assert answers(engine, SAMPLE, adapter=ready(found, "live", version), **SETTINGS) == before
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "adapter 'live' stays at the version that is loaded"
    ]
    with pytest.raises(UserError):
        ready(found, "live", "another")
    shutil.rmtree(folder)
    shutil.copytree(folders[1], folder)
    assert answers(engine, SAMPLE, adapter=ready(found, "live"), **SETTINGS) != before


def test_a_version_that_is_refused_is_not_loaded_again(
    folders: list[Path], tmp_path: Path, monkeypatch: Any
) -> None:
    folder = tmp_path / "live"
    shutil.copytree(folders[0], folder)
    engine = tiny_engine(ISOLATED)
    found = shelf(engine, folders, adapter_root=str(tmp_path))
    before = answers(engine, SAMPLE, adapter=ready(found, "live"), **SETTINGS)
    shutil.rmtree(folder)
    shutil.copytree(folders[1], folder)
    loads, load, call = [], engine.load_adapter, ModelRunner.__call__
    monkeypatch.setattr(
        engine, "load_adapter", lambda *args, **kwargs: (loads.append(args), load(*args, **kwargs))
    )
    with monkeypatch.context() as wrong:
        wrong.setattr(ModelRunner, "__call__", lambda self, step: call(self, step) * 1.01)
        assert [ready(found, "live") for _ in range(3)] == ["live"] * 3
    assert len(loads) == 1
    assert answers(engine, SAMPLE, adapter="live", **SETTINGS) == before


def test_a_registry_that_is_away_leaves_what_is_loaded_at_work(
    folders: list[Path], tmp_path: Path, monkeypatch: Any
) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "")  # to be as it was afterwards
        monkeypatch.delenv(name)
    found = shelf(tiny_engine(ISOLATED), folders, mlflow_uri="http://127.0.0.1:9", refresh_s=0.5)
    find = AdapterRegistry._find
    monkeypatch.setattr(AdapterRegistry, "_find", lambda *_: ("1", lambda _: folders[0]))
    ready(found, "models:/demo@champion")
    monkeypatch.setattr(AdapterRegistry, "_find", find)
    began = monotonic()
    found._loaded["models:/demo@champion"].looked = 0.0
    for _ in range(100):  # all but the first within refresh_s
        assert ready(found, "models:/demo@champion") == "models:/demo@champion"
    assert monotonic() - began < 20


def test_a_sample_does_not_go_on_with_another_version_of_a_folder(
    folders: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "live"
    shutil.copytree(folders[0], folder)
    found = shelf(tiny_engine(ISOLATED), folders, adapter_root=str(tmp_path))
    begun = found.version(ready(found, "base:live"))
    assert ready(found, "base:live", begun) == "base:live"
    save_random_adapter(folder, ModelConfig(base_model=str(folders[0].parent / "base")), seed=1)
    with pytest.raises(AdapterVersionGone, match="model='base:live': has a new version"):
        ready(found, "base:live", begun)
    assert [found.version(ready(found, name, "")) for name in ("base", "base")] == ["", ""]


class Nothing(FrozenConfig):
    """A run without settings."""


def test_the_registry_says_which_version_an_alias_means(
    folders: list[Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = tracking.absolute_uri("sqlite:///mlflow.db")
    for number, folder in enumerate(folders):
        run_of = tracking.Tracker.start(uri, "test", f"run{number}", Nothing(), key=str(number))
        run_of.log_folder(folder, "adapter")
        tracking.register_model(
            uri, run_of.run_id, "adapter", "demo", "champion" if number == 0 else "challenger"
        )
    engine = tiny_engine(ISOLATED)
    found = shelf(engine, folders, mlflow_uri=uri)
    expected = [answers(tiny_with(folder), SAMPLE, adapter="x", **SETTINGS) for folder in folders]
    assert answers(engine, SAMPLE, adapter=ready(found, "models:/demo@champion"), **SETTINGS) == expected[0]
    assert answers(engine, SAMPLE, adapter=ready(found, "models:/demo/2"), **SETTINGS) == expected[1]
    tracking.MlflowClient(uri).set_registered_model_alias("demo", "champion", "2")
    assert answers(engine, SAMPLE, adapter=ready(found, "models:/demo@champion"), **SETTINGS) == expected[1]
    moved = ready(
        found, "models:/demo@champion", version="1"
    )  # by a sample that had begun with it on another engine
    assert (moved, found.version(moved)) == ("models:/demo/1", "1")
    assert answers(engine, SAMPLE, adapter=moved, **SETTINGS) == expected[0]
    with pytest.raises(UserError, match="model='models:/demo@nobody': not in the registry"):
        ready(found, "models:/demo@nobody")
