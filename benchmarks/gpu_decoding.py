"""Decoding of sixteen branches on one GPU against Hugging Face's padded batch of the same prompts.

Random weights in the shape of Qwen2.5, bfloat16. One run is prefill and 64 new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from benchmarks.harness import Bench, ratio, seconds
from parallelmind.config import RopeConfig
from parallelmind.engine.engine import Engine
from parallelmind.engine.request import Sample
from parallelmind.evaluation.tiny_models import tiny_tokenizer
from parallelmind.model.patch import patch

BRANCHES, PROMPT = 16, 24


def build(config: PreTrainedConfig, device: str, patched: bool) -> Any:
    """Build the model on the device, with or without the patch, with the same random weights."""
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if patched:
        patch(model, RopeConfig(visibility="isolated"))
    return model


def texts(main: int, vocabulary: int) -> tuple[list[int], list[list[int]]]:
    """Return a random main of `main` tokens and the prompts of all branches."""
    random = np.random.default_rng(0)
    return (
        random.integers(3, vocabulary, main).tolist(),
        [random.integers(3, vocabulary, PROMPT).tolist() for _ in range(BRANCHES)],
    )


def engine_run(model: Any, main: int, tokens: int) -> Callable[[], None]:
    """One engine serves all runs; each run has another first token, so that no prefix is reused."""
    engine, vocabulary = Engine(model, tiny_tokenizer()), model.config.vocab_size
    first_tokens = iter(range(3, vocabulary))

    def run() -> None:
        shared, prompts = texts(main, vocabulary)
        engine.submit(
            Sample([next(first_tokens), *shared[1:]] if main else [], prompts),
            max_new_tokens=tokens,
            ignore_eos=True,
        )
        while engine.busy:
            engine.step()
        _synchronize(model)

    return run


def hugging_face_run(model: Any, main: int, tokens: int) -> Callable[[], None]:
    """Hugging Face `generate` on a batch in which every row holds main and one prompt."""
    shared, prompts = texts(main, model.config.vocab_size)
    ids = torch.tensor([shared + prompt for prompt in prompts], device=model.device)

    def run() -> None:
        length = {"max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
        _synchronize(model)

    return run


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def benches(
    config: PreTrainedConfig, device: str = "cuda", main: int = 1024, tokens: int = 64
) -> list[Bench]:
    @cache
    def model(patched: bool) -> Any:
        return build(config, device, patched)

    def speedup(shared: int) -> float:
        return ratio(
            hugging_face_run(model(False), shared, tokens), engine_run(model(True), shared, tokens), repeats=3
        )

    def rate(shared: int) -> float:
        run = engine_run(model(True), shared, tokens)
        run()
        return BRANCHES * tokens / min(seconds(run) for _ in range(3))

    return [
        Bench("decoding.gpu_batch16_tokens_per_s", None, "higher", "tokens/s", partial(rate, 0)),
        Bench("decoding.gpu_batch16_vs_hf", 1.5, "higher", "ratio", partial(speedup, 0)),
        Bench("decoding.gpu_shared_main_tokens_per_s", None, "higher", "tokens/s", partial(rate, main)),
        Bench("decoding.gpu_shared_main_vs_hf", 4, "higher", "ratio", partial(speedup, main)),
    ]
