"""A start from the principal directions of the base: stored, made again bit for bit, refused where it cannot
be had.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import IDS, ROPE, close, logits, logits_elsewhere, lora, patched, train
from peft import PeftModel
from tiny import tiny_llama, tiny_tokenizer

from parallelmind.config import ModelConfig
from parallelmind.errors import UserError
from parallelmind.evaluation.tiny_models import tiny_model
from parallelmind.model.adapter import add_lora, load_model_with_lora, save_adapter
from parallelmind.model.weights import load_weights, trained_weights


def test_a_pissa_adapter_works_in_a_fresh_process_by_its_stored_rank(
    base: ModelConfig, tmp_path: Path
) -> None:
    model = train(add_lora(patched(), lora(lora_init="pissa"), seed=0))
    save_adapter(model, tiny_tokenizer(), tmp_path / "adapter", base, ROPE, lora(lora_init="pissa"))
    assert close(logits_elsewhere(lora_path=str(tmp_path / "adapter"), lora_rank=8), logits(model))
    with pytest.raises(UserError, match="lora_rank=4: the adapter has lora_rank=8"):
        load_model_with_lora(lora_path=tmp_path / "adapter", lora_rank=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissa_is_made_again_bit_for_bit_and_resumes(dtype: torch.dtype) -> None:
    def made() -> PeftModel:
        return add_lora(patched().to(dtype), lora(lora_init="pissa"), seed=0)

    first, again = made(), made()
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), again.parameters(), strict=True))
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
        again, {name: weight.clone() for name, weight in trained_weights(first).items()}, "checkpoint"
    )
    assert torch.equal(logits(again.eval()), logits(first))


def test_pissa_splits_transposed_weights_too(tmp_path: Path) -> None:
    model = tiny_model("gpt2").eval()
    expected = model(IDS).logits
    adapted = add_lora(model, lora(lora_init="pissa", lora_targets="c_attn"), seed=0)
    assert close(adapted.eval()(IDS).logits, expected)
    for weight in trained_weights(adapted).values():
        weight.zero_()
    assert not close(adapted(IDS).logits, expected)


@pytest.mark.parametrize(
    ("settings", "overrides", "told"),
    [
        ({"lora_rank": 33}, {}, "lora_rank=33: lora_init=pissa takes at most the 32 directions of .*k_proj"),
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
def test_what_pissa_cannot_split_is_refused(
    settings: dict[str, Any], overrides: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        add_lora(tiny_llama(**overrides), lora(lora_init="pissa", **settings), seed=0)
