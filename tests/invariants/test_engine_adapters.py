"""Several adapters on one base model. Each sample is decoded by its own version, as if it were alone."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest
from engines import ISOLATED, decode, run_to_end, saved_adapters, tiny_engine, tokens_by_branch
from tiny import tiny_llama, tiny_tokenizer

from parallelmind.engine import native_lora
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.engine import Engine
from parallelmind.engine.output import Event
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
    """Tokens of SAMPLE with each adapter alone on the model, and without an adapter."""
    models = [load_adapter(patched(), tiny_tokenizer(), folder) for folder in folders]
    tokens = [
        decode(Engine(model, tiny_tokenizer(), EngineConfig(512)), SAMPLE, **SETTINGS)
        for model in [*models, patched()]
    ]
    assert len({str(branches) for branches in tokens}) == 3
    return tokens


def versions_on_model(engine: Engine) -> set[str]:
    return set(engine.model.peft_config)


def test_samples_of_several_adapters_and_of_the_base_are_decoded_together(folders, expected) -> None:
    engine = tiny_engine()
    for name, folder in zip("ab", folders, strict=True):
        engine.load_adapter(name, folder)
    adapters = ["a", "b", "base", None, "b", "a"]
    for _ in range(2):  # the second time mains are in the cache, once for each adapter
        sample_ids = [engine.submit(SAMPLE, adapter=name, **SETTINGS) for name in adapters]
        tokens = tokens_by_branch(run_to_end(engine))
        decoded = [[tokens[sample_id, branch] for branch in range(2)] for sample_id in sample_ids]
        assert decoded == [expected[index] for index in (0, 1, 2, 2, 1, 0)]
    assert engine.scheduler.num_reused_tokens >= len(adapters) * 40


def test_the_adapter_of_a_loaded_model_serves_samples_that_name_none(folders, expected) -> None:
    engine = Engine(
        load_adapter(patched(), tiny_tokenizer(), folders[0]), tiny_tokenizer(), EngineConfig(512)
    )
    engine.load_adapter("b", folders[1])
    for name, tokens in ((None, expected[0]), ("b", expected[1]), ("base", expected[2]), (None, expected[0])):
        assert decode(engine, SAMPLE, adapter=name, **SETTINGS) == tokens


def test_a_new_version_reuses_no_cache_and_running_samples_keep_the_old_version(folders, expected) -> None:
    engine = tiny_engine()
    engine.load_adapter("a", folders[0])
    old = engine.submit(SAMPLE, adapter="a", **SETTINGS)
    events = [event for _ in range(3) for event in engine.step()]
    engine.load_adapter("a", folders[1])
    new = engine.submit(SAMPLE, adapter="a", **SETTINGS)
    assert len(versions_on_model(engine)) == 2
    tokens = tokens_by_branch(events + run_to_end(engine))
    assert [[tokens[sample_id, branch] for branch in range(2)] for sample_id in (old, new)] == expected[:2]
    assert engine.scheduler.num_reused_tokens == 0
    assert len(versions_on_model(engine)) == 1


def test_an_unloaded_adapter_is_refused_and_running_samples_keep_it(folders, expected) -> None:
    engine = tiny_engine()
    for name, folder in zip("ab", folders, strict=True):
        engine.load_adapter(name, folder)
    sample_id = engine.submit(SAMPLE, adapter="a", **SETTINGS)
    events = engine.step()
    engine.unload_adapter("a")
    with pytest.raises(UserError, match=r"adapter='a': not loaded; choose from b, base"):
        engine.submit(SAMPLE, adapter="a")
    tokens = tokens_by_branch(events + run_to_end(engine))
    assert [tokens[sample_id, branch] for branch in range(2)] == expected[0]
    assert len(versions_on_model(engine)) == 1


def test_a_version_is_deleted_after_its_last_sample_is_cancelled(folders) -> None:
    engine = tiny_engine()
    engine.load_adapter("a", folders[0])
    sample_id = engine.submit(SAMPLE, adapter="a", **SETTINGS)
    engine.step()
    engine.load_adapter("a", folders[1])
    during = engine.model.register_forward_pre_hook(lambda *_: engine.cancel(sample_id))
    engine.step()
    during.remove()
    run_to_end(engine)
    assert len(versions_on_model(engine)) == 1


def test_the_engine_holds_no_weights_of_an_unloaded_adapter(folders) -> None:
    engine = tiny_engine()
    for name, folder in zip("ab", folders, strict=True):
        engine.load_adapter(name, folder)
    for name in ("a", "b", "base"):
        decode(engine, SAMPLE, adapter=name, **SETTINGS)
    assert num_converted_adapters() == 3
    engine.unload_adapter("a")
    decode(engine, SAMPLE, adapter="b", **SETTINGS)
    assert num_converted_adapters() == 1


def num_converted_adapters() -> int:
    gc.collect()
    return sum(type(thing) is native_lora._Adapter for thing in gc.get_objects())


@pytest.mark.filterwarnings("error::UserWarning")
def test_adapters_can_be_loaded_and_unloaded_repeatedly(folders, expected) -> None:
    engine = tiny_engine()
    for turn in range(4):
        engine.load_adapter("a", folders[turn % 2])
        engine.load_adapter("a", folders[1 - turn % 2])
        assert decode(engine, SAMPLE, adapter="a", **SETTINGS) == expected[1 - turn % 2]
        engine.unload_adapter("a")
        assert decode(engine, SAMPLE, **SETTINGS) == expected[2]
        assert len(versions_on_model(engine)) == 1, "peft keeps the last one, which no sample can name"


def test_an_adapter_that_does_not_fit_changes_nothing(folders, expected, tmp_path: Path) -> None:
    engine = tiny_engine(ISOLATED.model_copy(update={"visibility": "columnar"}))
    before = decode(engine, SAMPLE, **SETTINGS)
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
    assert decode(engine, SAMPLE, adapter="base", **SETTINGS) == before


@pytest.mark.parametrize("seed", range(3))
def test_tokens_do_not_depend_on_arrivals_joins_cancels_preemptions_and_swaps_of_adapters(
    seed: int, folders: list[Path]
) -> None:
    """The cache holds two or three samples; the adapter of a name changes while its samples run."""
    rng, engine = random.Random(seed), tiny_engine(cache_tokens=12 * BLOCK, max_prefill_tokens=24)
    main, (first, second), settings = SAMPLE.main, SAMPLE.branches, {**SETTINGS, "max_new_tokens": 40}
    expected = []
    for folder in folders:
        alone = tiny_engine()
        alone.load_adapter("a", folder)
        expected.append(decode(alone, SAMPLE, adapter="a", **settings))
    expected.append(decode(tiny_engine(), SAMPLE, **settings))
    version, samples, events = {"a": 0, "b": 1}, dict[int, int](), list[Event]()
    for name, index in version.items():
        engine.load_adapter(name, folders[index])
    for _ in range(50):
        match rng.randrange(6):
            case 0:
                name = rng.choice(["a", "b", "base"])
                number = engine.submit(Sample(main, [first]), adapter=name, **settings)
                samples[number] = version.get(name, 2)
                if rng.random() < 0.7:
                    engine.join(number, second, **settings)
            case 1 if samples:
                engine.cancel(rng.choice(list(samples)), 0)
            case 2 if rng.random() < 0.3:
                name, index = rng.choice("ab"), rng.randrange(2)
                engine.load_adapter(name, folders[index])
                version[name] = index
            case _:
                events += engine.step()
    events += run_to_end(engine)
    for (number, branch), tokens in tokens_by_branch(events).items():
        whole = expected[samples[number]][branch]
        assert tokens == whole[: len(tokens)]
        reason = next(e.finish_reason for e in reversed(events) if (e.sample, e.branch) == (number, branch))
        assert reason == "cancelled" or tokens == whole
    assert engine.scheduler.num_preemptions
    assert engine.scheduler.block_manager.num_allocated == 0
