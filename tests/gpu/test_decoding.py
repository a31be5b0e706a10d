"""Decoding on an accelerator: FlexAttention over the paged cache, and steps that are captured as graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from engines import COLUMNAR, ISOLATED, run_to_end, tokens_by_branch
from flexing import flex_decoding
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from parallelmind.config import RopeConfig
from parallelmind.engine.decoding_check import decoding_distance
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.evaluation.laws import check_cached_decoding
from parallelmind.evaluation.tiny_models import tiny_tokenizer
from parallelmind.model.patch import patch

MAIN = list(range(50, 90))
BOTH = pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")


@pytest.fixture
def flex_device(device: str) -> Iterator[str]:
    with nullcontext() if device == "cuda" else flex_decoding():
        yield device


def llama(device: str, heads: int = 4, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """With two heads of keys, of a size that the kernel takes."""
    size = {"hidden_size": 32 * heads, "intermediate_size": 64, "vocab_size": 128}
    kinds = {"num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**size, **kinds, attn_implementation="sdpa"))
    return model.to(device, dtype).eval()


def engine_on(device: str, config: RopeConfig, **kinds: Any) -> Engine:
    model = llama(device, **kinds)
    patch(model, config)
    return Engine(model, tiny_tokenizer(), EngineConfig(cache_tokens=1024))


def decode_all(engine: Engine) -> dict[tuple[int, int], list[int]]:
    """Samples of several shapes that begin and end at different steps."""
    events = []
    for number in range(6):
        prompts = [[number + 3] * (1 + branch) for branch in range(1 + number % 4)]
        engine.submit(Sample(MAIN[: 9 * number], prompts), max_new_tokens=6 + number, ignore_eos=True)
        events += engine.step() + engine.step()
    return tokens_by_branch(events + run_to_end(engine))


@CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("heads", [2, 4, 6], ids=["equal", "a power of two", "three share a key"])
def test_law_3(heads: int) -> None:
    check_cached_decoding(llama("cuda", heads))


@BOTH
def test_steps_are_captured_where_there_is_a_device(flex_device: str, config: RopeConfig) -> None:
    engine = engine_on(flex_device, config)
    first, second = (list(decode_all(engine).values()) for _ in range(2))
    assert first == second
    steps: Any = engine.runner._device_steps  # type: ignore[union-attr]
    assert any(steps._graphs.values()) == (flex_device == "cuda")


@CUDA
@pytest.mark.gpu
@BOTH
def test_graphs_and_uncaptured_steps_agree(config: RopeConfig) -> None:
    captured, uncaptured = (engine_on("cuda", config) for _ in range(2))
    decode_all(uncaptured)
    steps: Any = uncaptured.runner._device_steps  # type: ignore[union-attr]
    steps._captures = False
    steps._graphs.clear()
    for _ in range(2):
        assert list(decode_all(captured).values()) == list(decode_all(uncaptured).values())
    assert not any(steps._graphs.values())


@CUDA
@pytest.mark.gpu
@BOTH
def test_nothing_is_compiled_for_the_sizes_of_the_warm_up(config: RopeConfig) -> None:
    engine = engine_on("cuda", config)
    assert engine.warm_up()
    decode_all(engine)  # compiles the sizes of prompts
    before = counters["stats"]["unique_graphs"]
    for _ in range(3):
        decode_all(engine)
    assert counters["stats"]["unique_graphs"] == before


@CUDA
@pytest.mark.gpu
def test_bfloat16() -> None:
    """Parts are rounded before they are summed. One rounding of a logit is 0.004 of it."""
    model = llama("cuda", dtype=torch.bfloat16)
    patch(model, ISOLATED)
    assert decoding_distance(model, tiny_tokenizer(), ISOLATED) < 0.03
