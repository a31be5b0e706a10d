"""Decoding with one LoRA adapter on a GPU, and vLLM on the same weights where it is installed.

Random weights in the shape of Qwen2.5; sixteen prompts of 24 tokens.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from benchmarks.gpu_decoding import BRANCHES, build, engine_run, texts
from benchmarks.harness import seconds
from benchmarks.peers.install import is_installed
from benchmarks.peers.process import VLLM_CACHE, EngineProcess, peer_python
from benchmarks.peers.protocol import Request
from parallelmind.config import LoraConfig
from parallelmind.evaluation.tiny_models import tiny_tokenizer
from parallelmind.model.adapter import add_lora

_TURNS = 3


def against_vllm(config: PreTrainedConfig, device: str, tokens: int) -> dict[str, float]:
    """Tokens/s with an adapter; where vLLM is installed, also its tokens/s and the ratio."""
    model = add_lora(build(config, device, patched=True), LoraConfig(), seed=0).eval()
    run = engine_run(model, 0, tokens)
    run()
    own = _rate(tokens, run)
    figures = {"decoding.gpu_lora_tokens_per_s": own}
    if is_installed("vllm"):
        with tempfile.TemporaryDirectory() as folder:
            _save(model, Path(folder))
            del model, run
            vllm = _vllm_rate(Path(folder), config.vocab_size, tokens)
        figures |= {"decoding.gpu_lora_vllm_tokens_per_s": vllm, "decoding.gpu_lora_vs_vllm": own / vllm}
    return figures


def _rate(tokens: int, run: Callable[[], Any]) -> float:
    return BRANCHES * tokens / min(seconds(run) for _ in range(_TURNS))


def _save(model: Any, folder: Path) -> None:
    """The adapter, and the base model with a tokenizer, in folders below `folder`."""
    model.save_pretrained(folder / "adapter")
    model.unload().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")


def _vllm_rate(folder: Path, vocabulary: int, tokens: int) -> float:
    """Tokens/s of vLLM with the adapter; the first turn warms up."""
    command = [peer_python("vllm"), "-m", "benchmarks.peers.vllm_driver"]
    engine = EngineProcess(
        [*command, str(folder / "base"), "bfloat16", str(folder / "adapter")],
        {
            **VLLM_CACHE,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.getcwd(),
        },
    )
    _, prompts = texts(0, vocabulary)
    request = Request(prompts, tokens, [])
    engine.run([request])
    rate = BRANCHES * tokens / min(engine.run([request]).seconds for _ in range(_TURNS))
    engine.close()
    return rate
