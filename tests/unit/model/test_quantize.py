"""LoRA on a quantised base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import ROPE, branch_logits, logits, lora_config, train

from parallelmind.config import ModelConfig
from parallelmind.errors import UserError
from parallelmind.model.adapter import add_lora, load_model_with_lora, save_adapter
from parallelmind.model.base_model import load_base
from parallelmind.model.patch import patch
from parallelmind.model.patch_state import is_patched
from parallelmind.model.weights import trained_weights


def test_without_bitsandbytes_quantising_is_refused(
    base: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("parallelmind.model.preflight.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="^quantize=4bit: needs bitsandbytes; pip install bitsandbytes, or set quantize=none$"
    ):
        load_base(base.model_copy(update={"quantize": "4bit"}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_lora_on_a_quantised_base(base: ModelConfig, tmp_path: Path, bits: str, dtype: str) -> None:
    model, tokenizer = load_model_with_lora(base.base_model, quantize=bits, dtype=dtype, **ROPE.model_dump())
    assert is_patched(model)
    frozen = {weight.dtype for weight in model.parameters()}
    assert frozen == {getattr(torch, dtype), torch.int8 if bits == "8bit" else torch.uint8}
    before = logits(model)
    config = lora_config(use_dora=bits == "4bit")
    adapted = add_lora(model, config, seed=0)
    layers = {
        name.rpartition(".")[2] for name, module in adapted.named_modules() if hasattr(module, "lora_A")
    }
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    adapted.get_base_model().activation_checkpointing_enable()
    expected = logits(train(adapted))
    assert (expected - before).abs().max() > 0.1
    assert {weight.dtype for weight in trained_weights(adapted).values()} == {torch.float32}
    save_adapter(adapted, tokenizer, tmp_path / "adapter", base, ROPE, config)
    assert torch.equal(
        logits(load_model_with_lora(lora_path=tmp_path / "adapter", quantize=bits, dtype=dtype)[0]), expected
    )
    assert not torch.equal(
        logits(load_model_with_lora(lora_path=tmp_path / "adapter", dtype=dtype)[0]), expected
    )


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_logits_in_eval_mode_do_not_change_later_gradients(base: ModelConfig, bits: str) -> None:
    """Validation does not change training: a packed layer would pass no gradient to those below it."""
    gradients = []
    for logits_first in (False, True):
        model, _ = load_base(ModelConfig.model_validate({**base.model_dump(), "quantize": bits}))
        patch(model, ROPE)
        if logits_first:
            logits(model)
        adapted = add_lora(model, lora_config(), seed=0)
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(weight, 0.05)
        branch_logits(adapted).float().logsumexp(-1).sum().backward()
        gradients.append([weight.grad for weight in adapted.parameters() if weight.requires_grad])
    for alone, after in zip(*gradients, strict=True):
        assert alone.abs().max() > 0
        assert torch.equal(alone, after)


@pytest.mark.parametrize(
    ("bits", "settings", "message"),
    [
        ("4bit", {"lora_init": "pissa"}, r"lora_init=pissa: cannot split .* \(Linear4bit\)"),
        ("8bit", {"use_dora": True}, "^use_dora=true: not supported on 8-bit weights"),
    ],
)
def test_settings_that_a_quantised_base_does_not_support_are_refused(
    base: ModelConfig, bits: str, settings: dict[str, Any], message: str
) -> None:
    model, _ = load_base(ModelConfig.model_validate({**base.model_dump(), "quantize": bits}))
    with pytest.raises(UserError, match=message):
        add_lora(model, lora_config(**settings), seed=0)
