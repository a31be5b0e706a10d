"""PiSSA adapters: stored as plain ones, initialised bit for bit again, refused for unsupported layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import (
    IDS,
    ROPE,
    allclose_logits,
    logits,
    logits_in_fresh_process,
    lora_config,
    patched_llama,
    train,
)
from peft import PeftModel
from tiny import tiny_llama, tiny_tokenizer

from parallelmind.config import ModelConfig
from parallelmind.errors import UserError
from parallelmind.evaluation.tiny_models import tiny_model
from parallelmind.model.adapter import add_lora, load_model_with_lora, save_adapter
from parallelmind.model.weights import load_weights, trained_weights


def test_a_pissa_adapter_loads_in_a_new_process_with_its_stored_rank(
    base: ModelConfig, tmp_path: Path
) -> None:
    model = train(add_lora(patched_llama(), lora_config(lora_init="pissa"), seed=0))
    save_adapter(model, tiny_tokenizer(), tmp_path / "adapter", base, ROPE, lora_config(lora_init="pissa"))
    assert allclose_logits(
        logits_in_fresh_process(lora_path=str(tmp_path / "adapter"), lora_rank=8), logits(model)
    )
    with pytest.raises(UserError, match="lora_rank=4: the adapter has lora_rank=8"):
        load_model_with_lora(lora_path=tmp_path / "adapter", lora_rank=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initialisation_is_deterministic_and_training_resumes(dtype: torch.dtype) -> None:
    def initialised() -> PeftModel:
        return add_lora(patched_llama().to(dtype), lora_config(lora_init="pissa"), seed=0)

    first, second = initialised(), initialised()
    assert all(
        torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert {weight.dtype for weight in trained_weights(first).values()} == {torch.float32}
    changed = [name for name, weight in first.get_base_model().named_parameters() if "base_layer" in name]
    own = dict(tiny_llama().to(dtype).named_parameters())
    assert changed
    assert not any(
        torch.equal(first.get_base_model().get_parameter(name), own[name.replace(".base_layer", "")])
        for name in changed
    )
    layer = first.get_base_model().model.layers[0].self_attn.q_proj
    whole = tiny_llama().to(dtype).model.layers[0].self_attn.q_proj.weight.float()
    left, values, right = torch.linalg.svd(whole)
    expected = (left[:, :4] * values[:4]) @ right[:4]
    assert torch.allclose(
        1.5 * layer.lora_B.default.weight @ layer.lora_A.default.weight, expected, atol=2e-2
    )
    train(first)
    load_weights(
        second, {name: weight.clone() for name, weight in trained_weights(first).items()}, "checkpoint"
    )
    assert torch.equal(logits(second.eval()), logits(first))


def test_pissa_splits_transposed_weights_too(tmp_path: Path) -> None:
    model = tiny_model("gpt2").eval()
    expected = model(IDS).logits
    adapted = add_lora(model, lora_config(lora_init="pissa", lora_targets="c_attn"), seed=0)
    assert allclose_logits(adapted.eval()(IDS).logits, expected)
    for weight in trained_weights(adapted).values():
        weight.zero_()
    assert not allclose_logits(adapted(IDS).logits, expected)


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"lora_rank": 33}, {}, "lora_rank=33: lora_init=pissa allows at most 32 for .*k_proj"),
        (
            {"lora_targets": "lm_head"},
            {"tie_word_embeddings": True},
            "lora_init=pissa: lm_head shares its weight",
        ),
        (
            {"lora_targets": "embed_tokens"},
            {},
            r"lora_init=pissa: cannot split model.embed_tokens \(Embedding\)",
        ),
    ],
)
def test_layers_that_cannot_be_split_are_refused(
    settings: dict[str, Any], overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(tiny_llama(**overrides), lora_config(lora_init="pissa", **settings), seed=0)
