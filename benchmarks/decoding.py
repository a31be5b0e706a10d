"""Decoding throughput against Hugging Face `generate`: one prompt at a time, and as a left-padded batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

import parallelmind as pm
from benchmarks.harness import Bench, ratio, seconds
from benchmarks.text import passages, tokenizer
from parallelmind.config import Dtype, ModelConfig, Visibility
from parallelmind.engine.model_runner import ModelRunner
from parallelmind.model.base_model import load_base

NEW_TOKENS, MAIN_TOKENS, BRANCHES = 64, 1024, 16


@cache
def patched(visibility: Visibility, dtype: Dtype) -> Any:
    """The default base model with the 2D RoPE patch."""
    model, _ = pm.load_model_with_lora(
        base_model=ModelConfig().base_model, visibility=visibility, dtype=dtype
    )
    return model


@cache
def plain(dtype: Dtype) -> Any:
    """The default base model without a patch."""
    return load_base(ModelConfig(dtype=dtype))[0]


def prompts(count: int) -> list[list[int]]:
    """Questions of 8 to 24 tokens; the lengths differ, so a padded batch contains padding."""
    questions = [branch for _, branches in passages(8) for branch in branches]
    return [question[:24] for question in questions[:count]]


def shared_main(tokens: int = MAIN_TOKENS) -> list[int]:
    """The first `tokens` tokens of the concatenated passages."""
    ids = [token for main, _ in passages(64) for token in main]
    return ids[:tokens]


def branches(
    main: list[int], texts: list[list[int]], dtype: Dtype, visibility: Visibility = "isolated"
) -> Callable[[], list[str]]:
    """Decode the prompts as branches. Isolated ones do the work of a batch; columnar ones do more."""
    sample = pm.Sample(main, texts)
    return lambda: pm.generate(
        patched(visibility, dtype), tokenizer(), sample, max_new_tokens=NEW_TOKENS, ignore_eos=True
    )


def one_by_one(texts: list[list[int]], dtype: Dtype) -> Callable[[], Any]:
    """Decode one prompt at a time with Hugging Face."""
    return lambda: [_generate(torch.tensor([text]), None, dtype) for text in texts]


def padded(texts: list[list[int]], dtype: Dtype) -> Callable[[], Any]:
    """Decode all prompts as one left-padded batch with Hugging Face."""
    longest = max(map(len, texts))
    pad = tokenizer().pad_token_id
    ids = torch.tensor([[pad] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    return lambda: _generate(ids, mask, dtype)


def _generate(ids: torch.Tensor, mask: torch.Tensor | None, dtype: Dtype) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.inference_mode():
        return plain(dtype).generate(
            ids, attention_mask=mask, do_sample=False, return_dict_in_generate=True, **length
        )


def _vs_one_by_one(count: int, dtype: Dtype) -> float:
    texts = prompts(count)
    return ratio(one_by_one(texts, dtype), branches([], texts, dtype), repeats=1 if count == BRANCHES else 3)


def _vs_batch(count: int, dtype: Dtype, visibility: Visibility = "isolated") -> float:
    texts = prompts(count)
    return ratio(padded(texts, dtype), branches([], texts, dtype, visibility), repeats=3)


def _rate(count: int, dtype: Dtype = "float32") -> float:
    decode = branches([], prompts(count), dtype)
    decode()
    return count * NEW_TOKENS / min(seconds(decode) for _ in range(3))


def _shared_main_vs_batch() -> float:
    main, texts = shared_main(), prompts(BRANCHES)
    full = [main + text for text in texts]
    return ratio(padded(full, "float32"), branches(main, texts, "float32"), repeats=1)


def _memory_vs_batch() -> float:
    """KV cache bytes of Hugging Face's batch over the bytes of all blocks that our pool has used."""
    main, texts = shared_main(), prompts(BRANCHES)
    hugging_face: Any = padded([main + text for text in texts], "float32")().past_key_values
    tensors: list[torch.Tensor] = [
        tensor for layer in hugging_face.layers for tensor in (layer.keys, layer.values)
    ]
    engine = pm.Engine(patched("isolated", "float32"), tokenizer())
    engine.submit(pm.Sample(main, texts), max_new_tokens=NEW_TOKENS, ignore_eos=True)
    while engine.busy:
        engine.step()
    assert isinstance(engine.runner, ModelRunner)
    return sum(tensor.nbytes for tensor in tensors) / engine.runner.cache.bytes()


BENCHES = [
    *(
        Bench(f"decoding.batch{n}_tokens_per_s", None, "higher", "tokens/s", partial(_rate, n))
        for n in (1, 4, 16)
    ),
    Bench("decoding.batch1_vs_one_by_one", None, "higher", "ratio", partial(_vs_one_by_one, 1, "float32")),
    Bench("decoding.batch4_vs_one_by_one", None, "higher", "ratio", partial(_vs_one_by_one, 4, "float32")),
    Bench("decoding.batch4_vs_hf", None, "higher", "ratio", partial(_vs_batch, 4, "float32")),
    Bench(
        "decoding.batch16_vs_one_by_one", 5, "higher", "ratio", partial(_vs_one_by_one, BRANCHES, "float32")
    ),
    Bench("decoding.batch16_vs_hf", 1, "higher", "ratio", partial(_vs_batch, BRANCHES, "float32")),
    Bench(
        "decoding.columnar16_vs_hf", 1, "higher", "ratio", partial(_vs_batch, BRANCHES, "float32", "columnar")
    ),
    Bench(
        "decoding.bf16_batch16_vs_one_by_one",
        8,
        "higher",
        "ratio",
        partial(_vs_one_by_one, BRANCHES, "bfloat16"),
    ),
    Bench("decoding.bf16_batch16_vs_hf", 1.5, "higher", "ratio", partial(_vs_batch, BRANCHES, "bfloat16")),
    Bench("decoding.shared_main_vs_hf", 8, "higher", "ratio", _shared_main_vs_batch),
    Bench("decoding.shared_main_memory_vs_hf", 8, "higher", "ratio", _memory_vs_batch),
]
