"""A compiled engine decodes the tokens of an uncompiled one, and compiles once."""

from __future__ import annotations

import random

import pytest
from engines import COLUMNAR, ISOLATED, decode, run_to_end, save_random_adapter, tiny_engine, tokens_by_branch
from penalties import LEARNED, LORA, learning
from tiny import tiny_llama, tiny_tokenizer
from torch._dynamo.utils import counters

from parallelmind.config import ModelConfig, RopeConfig
from parallelmind.engine import compiled_forward, model_runner
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.errors import UserNotice
from parallelmind.model.adapter import save_adapter

MAIN = list(range(50, 90))
SAMPLES = (Sample(MAIN, [[5, 6, 7], [8], list(range(100, 120))]), Sample([], [[9, 10]]), Sample(MAIN, [[11]]))
SETTINGS = {"max_new_tokens": 8, "ignore_eos": True}


def compiled_engine(config: RopeConfig, **limits: int) -> Engine:
    engine = tiny_engine(config, **limits)
    assert engine.warm_up()
    return engine


@pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
def test_a_compiled_engine_decodes_the_same_tokens(config: RopeConfig) -> None:
    """Two engines of one configuration: torch must not take the code of the first for the second."""
    plain = [decode(tiny_engine(config), sample, **SETTINGS) for sample in SAMPLES]
    for _ in range(2):
        engine = compiled_engine(config)
        assert [decode(engine, sample, **SETTINGS) for sample in SAMPLES] == plain


def test_nothing_is_compiled_after_the_warm_up() -> None:
    """Over steps with any number of tokens, samples, branches and prompts."""
    engine, rng = compiled_engine(ISOLATED, max_prefill_tokens=24), random.Random(0)
    before = counters["stats"]["unique_graphs"]
    num_steps = 0
    while num_steps < 300:
        if rng.random() < 0.2:
            main, prompts = MAIN[: rng.choice([0, 9, 40])], [[3] * rng.randint(1, 20)] * rng.randint(1, 3)
            engine.submit(Sample(main, prompts), max_new_tokens=rng.randint(1, 12), ignore_eos=True)
        engine.step()
        num_steps += 1
    assert counters["stats"]["unique_graphs"] == before


def test_an_adapter_that_is_loaded_later_is_computed(tmp_path) -> None:
    save_random_adapter(tmp_path, ModelConfig(base_model="tiny"), 1)
    plain, engine = tiny_engine(ISOLATED), compiled_engine(ISOLATED)
    tokens = []
    for each in (plain, engine):
        each.load_adapter("a", tmp_path)
        ids = [each.submit(SAMPLES[0], adapter=name, **SETTINGS) for name in ("a", "base")]
        decoded = tokens_by_branch(run_to_end(each))
        tokens.append([[decoded[number, branch] for branch in range(3)] for number in ids])
    assert tokens[0] == tokens[1]
    assert tokens[0][0] != tokens[0][1], "the adapter changes tokens"


def test_a_compiled_engine_has_the_penalties_of_every_adapter(tmp_path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        model = learning(tiny_llama(), seed=seed)
        save_adapter(model, tiny_tokenizer(), tmp_path / name, ModelConfig(base_model="tiny"), LEARNED, LORA)
    tokens = []
    for each in (tiny_engine(LEARNED), compiled_engine(LEARNED)):
        for name in ("a", "b"):
            each.load_adapter(name, tmp_path / name)
        ids = [each.submit(SAMPLES[0], adapter=name, **SETTINGS) for name in ("a", "b", "base")]
        decoded = tokens_by_branch(run_to_end(each))
        tokens.append([[decoded[number, branch] for branch in range(3)] for number in ids])
    assert tokens[0] == tokens[1]
    assert len({str(branches) for branches in tokens[0]}) == 3


def test_a_compiler_that_fails_is_told_and_the_engine_runs_uncompiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no space left\non device")

    monkeypatch.setattr(compiled_forward.torch, "compile", lambda *_, **__: fail)
    engine = tiny_engine(ISOLATED)
    with pytest.warns(UserNotice, match=r"decoding runs uncompiled \(RuntimeError: no space left\)"):
        assert not engine.warm_up()
    assert decode(engine, SAMPLES[0], **SETTINGS) == decode(tiny_engine(ISOLATED), SAMPLES[0], **SETTINGS)


def test_small_models_and_machines_without_kernels_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(ISOLATED)
    assert not engine.warm_up(always=False)
    monkeypatch.setattr(model_runner, "kernels", lambda: None)
    assert not engine.warm_up()
