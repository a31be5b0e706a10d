"""Branches decoded in one sequence against Hugging Face `generate`, one by one and as a left-padded batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

import parallelmind as pm
from benchmarks.harness import Bench, ratio, seconds
from benchmarks.text import passages, tokenizer
from parallelmind.config import BaseConfig, Visibility
from parallelmind.model.base import load_base

NEW_TOKENS, MAIN_TOKENS = 64, 1024


@cache
def patched(visibility: Visibility) -> Any:
    model, _ = pm.load_model_with_lora(base_model=BaseConfig().base_model, visibility=visibility)
    return model


@cache
def plain() -> Any:
    return load_base(BaseConfig())[0]


def prompts(count: int) -> list[list[int]]:
    """Questions of 8 to 24 tokens, so that a padded batch has something to pad."""
    questions = [branch for _, branches in passages(8) for branch in branches]
    return [question[:24] for question in questions[:count]]


def shared_main() -> list[int]:
    ids = [token for main, _ in passages(16) for token in main]
    return ids[:MAIN_TOKENS]


def branches(main: list[int], texts: list[list[int]], visibility: Visibility = "isolated") -> Callable[[], Any]:
    """Isolated branches do what a batch does; columnar ones, the default, also read each other."""
    sample = pm.Sample(main, texts)
    return lambda: pm.generate(patched(visibility), tokenizer(), sample, max_new_tokens=NEW_TOKENS, ignore_eos=True)


def one_by_one(texts: list[list[int]]) -> Callable[[], Any]:
    return lambda: [_generate(torch.tensor([text])) for text in texts]


def padded(texts: list[list[int]]) -> Callable[[], Any]:
    longest = max(map(len, texts))
    pad = tokenizer().pad_token_id
    ids = torch.tensor([[pad] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    return lambda: _generate(ids, mask)


def _generate(ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.inference_mode():
        return plain().generate(ids, attention_mask=mask, do_sample=False, **length)


def _vs_one_by_one(count: int) -> float:
    texts = prompts(count)
    return ratio(one_by_one(texts), branches([], texts), repeats=3)


def _vs_batch(count: int, visibility: Visibility = "isolated") -> float:
    texts = prompts(count)
    return ratio(padded(texts), branches([], texts, visibility), repeats=3)


def _rate(count: int) -> float:
    work = branches([], prompts(count))
    work()
    return count * NEW_TOKENS / min(seconds(work) for _ in range(3))


def _shared_main_vs_batch() -> float:
    main, texts = shared_main(), prompts(16)
    full = [main + text for text in texts]
    return ratio(padded(full), branches(main, texts), repeats=3)


BENCHES = [
    *(Bench(f"decoding.batch{n}_tokens_per_s", None, "higher", "tokens/s", partial(_rate, n)) for n in (1, 4, 16)),
    Bench("decoding.batch1_vs_one_by_one", None, "higher", "ratio", partial(_vs_one_by_one, 1)),
    Bench("decoding.batch4_vs_one_by_one", None, "higher", "ratio", partial(_vs_one_by_one, 4)),
    Bench("decoding.batch4_vs_hf", None, "higher", "ratio", partial(_vs_batch, 4)),
    Bench("decoding.batch16_vs_one_by_one", 5, "higher", "ratio", partial(_vs_one_by_one, 16)),
    Bench("decoding.batch16_vs_hf", 1, "higher", "ratio", partial(_vs_batch, 16)),
    Bench("decoding.columnar16_vs_hf", 1, "higher", "ratio", partial(_vs_batch, 16, "columnar")),
    Bench("decoding.shared_main_vs_hf", 3, "higher", "ratio", _shared_main_vs_batch),
]
