"""Engines that share a model decode as engines with a model of their own, in turns and in threads."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from engines import COLUMNAR, ISOLATED, run_to_end, saved_adapters, tokens_by_branch
from tiny import tiny_llama, tiny_tokenizer

from parallelmind.engine.engine import Engine
from parallelmind.engine.output import Event
from parallelmind.engine.request import Sample
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.errors import UserError
from parallelmind.model.patch import patch

SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
SAMPLES = [Sample(list(range(50, 80)), [[5], [6, 7]]), Sample(list(range(90, 95)), [[8, 9, 10]])]


def engine_on(model: Any) -> Engine:
    return Engine(model, tiny_tokenizer(), EngineConfig(1024, max_prefill_tokens=16))


def patched_model(config: Any = COLUMNAR) -> Any:
    model = tiny_llama()
    patch(model, config)
    return model


def run_in_turns(engines: list[Engine]) -> list[list[Event]]:
    events: list[list[Event]] = [[] for _ in engines]
    while any(engine.busy for engine in engines):
        for own, engine in zip(events, engines, strict=True):
            own += engine.step() if engine.busy else []
    return events


def run_in_threads(engines: list[Engine]) -> list[list[Event]]:
    events: list[list[Event]] = [[] for _ in engines]
    threads = [
        Thread(target=lambda own, engine: own.extend(run_to_end(engine)), args=pair)
        for pair in zip(events, engines, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return events


@pytest.mark.parametrize("run", [run_in_turns, run_in_threads])
def test_two_engines_on_one_model_decode_as_on_two(run: Any) -> None:
    def outputs(models: list[Any]) -> list[Any]:
        engines = [engine_on(model) for model in models]
        for engine, sample in zip(engines, SAMPLES, strict=True):
            engine.submit(sample, **SETTINGS)
        return [tokens_by_branch(events) for events in run(engines)]

    model = patched_model()
    assert outputs([model, model]) == outputs([patched_model(), patched_model()])


@pytest.mark.parametrize("run", [run_in_turns, run_in_threads])
def test_adapters_of_two_engines_on_one_model_do_not_mix(run: Any, tmp_path: Path) -> None:
    folders = saved_adapters(tmp_path)
    first = engine_on(patched_model(ISOLATED))
    first.load_adapter("mine", folders[0])
    expected = []
    second = engine_on(first.model)
    second.load_adapter("mine", folders[1])
    for engine in (first, second):
        engine.submit(SAMPLES[0], adapter="mine", **SETTINGS)
        engine.submit(SAMPLES[1], adapter="base", **SETTINGS)
        expected.append(tokens_by_branch(run_to_end(engine)))
    assert expected[0] != expected[1]
    for engine in (first, second):
        engine.submit(SAMPLES[0], adapter="mine", **SETTINGS)
        engine.submit(SAMPLES[1], adapter="base", **SETTINGS)
    again = [list(tokens_by_branch(events).values()) for events in run([first, second])]
    assert [sorted(tokens) for tokens in again] == [sorted(tokens.values()) for tokens in expected]


def test_engines_with_and_without_adapters_on_one_bare_model_are_refused(tmp_path: Path) -> None:
    folders, model = saved_adapters(tmp_path), patched_model(ISOLATED)
    first, second = engine_on(model), engine_on(model)
    with pytest.raises(UserError, match="adapter='mine': another engine decodes with the bare model"):
        first.load_adapter("mine", folders[0])
    del second
    first.load_adapter("mine", folders[0])
    with pytest.raises(UserError, match="model: another engine has loaded adapters on it"):
        engine_on(model)
