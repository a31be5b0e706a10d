"""Engines with learned sibling penalties compute what a training pass does, for every adapter of a batch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import decode, run_to_end, tokens_by_branch
from families import variant
from flexing import flex_decoding
from penalties import LEARNED, LORA, learning
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from parallelmind.config import ModelConfig, RopeConfig
from parallelmind.engine import native_attention
from parallelmind.engine.decoding_check import CHECK_SAMPLE, CHECK_TREE, decoding_distance
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.evaluation.probes import ROUNDING_TOLERANCE
from parallelmind.model.adapter import load_adapter, save_adapter
from parallelmind.model.patch import patch

SAMPLE = Sample(list(range(50, 60)), [[5, 6, 7], [8], [9, 4]])
SETTINGS: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True}
ROPES = [LEARNED, LEARNED.model_copy(update={"positions": "flat", "align_to": "right", "rope_2d_ratio": 0.0})]


def tiny(backend: str) -> Any:
    """A tiny model; eager layers get dense masks."""
    model = tiny_llama()
    if backend == "dense":
        model.set_attn_implementation("eager")
    return model


@pytest.fixture(params=["native", "torch", "flex", "dense"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "torch":
        monkeypatch.setattr(native_attention, "is_supported", lambda query, value: False)
    with flex_decoding() if request.param == "flex" else nullcontext():
        yield request.param


@pytest.mark.parametrize("rope", ROPES, ids=["time", "flat"])
@pytest.mark.parametrize("sample", [CHECK_SAMPLE, CHECK_TREE], ids=["flat", "tree"])
def test_decoding_computes_what_training_does(backend: str, rope: RopeConfig, sample: Sample) -> None:
    model = learning(tiny(backend), rope).eval()
    assert decoding_distance(model, tiny_tokenizer(), rope, sample) <= ROUNDING_TOLERANCE


def test_decoding_with_windows_computes_what_training_does(backend: str) -> None:
    attention = "eager" if backend == "dense" else "sdpa"
    model = learning(variant("windows beside full attention", attention)).eval()
    assert decoding_distance(model, tiny_tokenizer(), LEARNED, CHECK_SAMPLE) <= ROUNDING_TOLERANCE


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("penalties")
    base = ModelConfig(base_model=save_tiny(root / "base"))
    for seed in range(2):
        model = learning(tiny_llama(), seed=seed)
        with torch.no_grad():  # nothing but penalties makes the difference
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.zero_()
        save_adapter(model, tiny_tokenizer(), root / str(seed), base, LEARNED, LORA)
    return [root / "0", root / "1"]


def patched(backend: str) -> Any:
    model = tiny(backend)
    patch(model, LEARNED)
    return model


def test_samples_of_several_adapters_have_their_own_penalties(backend: str, folders: list[Path]) -> None:
    config = EngineConfig(cache_tokens=1024)
    models = [
        *(load_adapter(patched(backend), tiny_tokenizer(), folder) for folder in folders),
        patched(backend),
    ]
    expected = [decode(Engine(model, tiny_tokenizer(), config), SAMPLE, **SETTINGS) for model in models]
    assert len({str(tokens) for tokens in expected}) == 3
    engine = Engine(patched(backend), tiny_tokenizer(), config)
    for name, folder in zip("ab", folders, strict=True):
        engine.load_adapter(name, folder)
    adapters = ["a", "b", "base", "b", "a"]
    samples = [engine.submit(SAMPLE, adapter=name, **SETTINGS) for name in adapters]
    tokens = tokens_by_branch(run_to_end(engine))
    decoded = [[tokens[sample, branch] for branch in range(3)] for sample in samples]
    assert decoded == [expected[index] for index in (0, 1, 2, 1, 0)]
    assert engine.runner.batches_adapters == (backend in ("native", "torch"))
