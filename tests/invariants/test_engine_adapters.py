"""Several adapters on one base: each sample is decoded by the version that it began with, as if that were the
only one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import ISOLATED, answers, run, said, saved_adapters, tiny_engine
from tiny import tiny_llama, tiny_tokenizer

from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.errors import UserError
from parallelmind.model.adapter import load_adapter
from parallelmind.model.patch import patch

SAMPLE = Sample(list(range(50, 90)), [[5, 6, 7], [8]])
SETTINGS = {"max_new_tokens": 8, "ignore_eos": True}


def patched():
    model = tiny_llama()
    patch(model, ISOLATED)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def expected(folders: list[Path]) -> list[list[list[int]]]:
    """What SAMPLE says with each adapter when it is the only one, and what it says without."""
    models = [load_adapter(patched(), tiny_tokenizer(), folder) for folder in folders]
    found = [
        answers(Engine(model, tiny_tokenizer(), EngineConfig(512)), SAMPLE, **SETTINGS)
        for model in [*models, patched()]
    ]
    assert len({str(each) for each in found}) == 3
    return found


def on_model(engine: Engine) -> set[str]:
    return set(engine.model.peft_config)


def test_samples_of_several_adapters_and_of_the_base_are_decoded_together(folders, expected) -> None:
    engine = tiny_engine()
    for name, folder in zip("ab", folders, strict=True):
        engine.load_adapter(name, folder)
    asked = ["a", "b", "base", None, "b", "a"]
    for _ in range(2):  # the second time mains are in the cache, once for each adapter
        numbers = [engine.submit(SAMPLE, adapter=name, **SETTINGS) for name in asked]
        tokens = said(run(engine))
        found = [[tokens[number, branch] for branch in range(2)] for number in numbers]
        assert found == [expected[at] for at in (0, 1, 2, 2, 1, 0)]
    assert engine.scheduler.num_reused_tokens == len(asked) * 32


def test_a_model_loaded_with_an_adapter_keeps_it_for_those_who_name_none(folders, expected) -> None:
    engine = Engine(
        load_adapter(patched(), tiny_tokenizer(), folders[0]), tiny_tokenizer(), EngineConfig(512)
    )
    engine.load_adapter("b", folders[1])
    for name, found in ((None, expected[0]), ("b", expected[1]), ("base", expected[2]), (None, expected[0])):
        assert answers(engine, SAMPLE, adapter=name, **SETTINGS) == found


def test_a_new_version_reads_its_main_anew_and_samples_under_way_end_with_the_old(folders, expected) -> None:
    engine = tiny_engine()
    engine.load_adapter("a", folders[0])
    old = engine.submit(SAMPLE, adapter="a", **SETTINGS)
    events = [event for _ in range(3) for event in engine.step()]
    engine.load_adapter("a", folders[1])
    new = engine.submit(SAMPLE, adapter="a", **SETTINGS)
    assert len(on_model(engine)) == 2
    tokens = said(events + run(engine))
    assert [[tokens[number, branch] for branch in range(2)] for number in (old, new)] == expected[:2]
    assert engine.scheduler.num_reused_tokens == 0
    assert len(on_model(engine)) == 1


def test_what_is_unloaded_is_refused_and_ends_what_it_has_begun(folders, expected) -> None:
    engine = tiny_engine()
    for name, folder in zip("ab", folders, strict=True):
        engine.load_adapter(name, folder)
    begun = engine.submit(SAMPLE, adapter="a", **SETTINGS)
    events = engine.step()
    engine.unload_adapter("a")
    with pytest.raises(UserError, match=r"adapter='a': not loaded; choose from b, base"):
        engine.submit(SAMPLE, adapter="a")
    tokens = said(events + run(engine))
    assert [tokens[begun, branch] for branch in range(2)] == expected[0]
    assert len(on_model(engine)) == 1


def test_a_version_whose_last_sample_is_cancelled_is_let_go(folders) -> None:
    engine = tiny_engine()
    engine.load_adapter("a", folders[0])
    number = engine.submit(SAMPLE, adapter="a", **SETTINGS)
    engine.step()
    engine.load_adapter("a", folders[1])
    during = engine.model.register_forward_pre_hook(lambda *_: engine.cancel(number))
    engine.step()
    during.remove()
    run(engine)
    assert len(on_model(engine)) == 1


@pytest.mark.filterwarnings("error::UserWarning")
def test_adapters_come_and_go_again_and_again(folders, expected) -> None:
    engine = tiny_engine()
    for turn in range(4):
        engine.load_adapter("a", folders[turn % 2])
        engine.load_adapter("a", folders[1 - turn % 2])
        assert answers(engine, SAMPLE, adapter="a", **SETTINGS) == expected[1 - turn % 2]
        engine.unload_adapter("a")
        assert answers(engine, SAMPLE, **SETTINGS) == expected[2]
        assert len(on_model(engine)) == 1, "peft keeps the last one, but nobody can ask for it"


def test_an_adapter_that_does_not_fit_changes_nothing(folders, expected, tmp_path: Path) -> None:
    engine = tiny_engine(ISOLATED.model_copy(update={"visibility": "columnar"}))
    before = answers(engine, SAMPLE, **SETTINGS)
    for name, folder, message in (
        ("a", folders[0], "visibility"),
        ("a", tmp_path, "adapter"),
        ("base", folders[0], "adapter='base'"),
    ):
        with pytest.raises(UserError, match=message):
            engine.load_adapter(name, folder)
    for name in ("a", "base"):
        with pytest.raises(UserError, match=f"adapter='{name}'"):
            engine.unload_adapter(name)
    assert answers(engine, SAMPLE, adapter="base", **SETTINGS) == before
