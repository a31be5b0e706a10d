"""Adapters that peft wrote alone are loaded with the rope settings of their training, and saved as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapting import logits
from tiny import save_tiny

import parallelmind as pm
from parallelmind.model.manifest import read_adapter

ROPE: dict[str, Any] = {"rope_2d_ratio": 0.25, "visibility": "isolated"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(base: str) -> tuple[Any, Any]:
    """A patched model with an adapter of peft whose weights are random."""
    model, tokenizer = pm.load_model_with_lora(base, **ROPE)
    settings = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def folder(trained: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peft")
    trained[0].save_pretrained(path)
    return path


def test_the_rope_settings_are_named_once(
    base: str, trained: tuple[Any, Any], folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = pm.load_model_with_lora(lora_path=folder, device="cpu", **ROPE)
    assert torch.equal(logits(model), logits(trained[0]))
    pm.save_adapter(model, tokenizer, tmp_path / "own")
    manifest = read_adapter(tmp_path / "own")
    assert manifest.rope == pm.rope_config(trained[0])
    assert manifest.base_model == base
    assert manifest.base is not None
    assert all(not name.count("lora_") and not name.count("base_layer") for name in manifest.base.weights)
    assert "model.layers.0.self_attn.q_proj.weight" in manifest.base.weights
    assert manifest.lora is not None
    assert (manifest.lora.lora_rank, manifest.lora.lora_alpha) == (4, 12)
    assert manifest.lora.lora_targets == "q_proj,v_proj"
    again, _ = pm.load_model_with_lora(lora_path=tmp_path / "own")
    assert torch.equal(logits(again), logits(trained[0]))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({}, "as where peft wrote it; name the rope settings of its training"),
        ({"visibility": "isolated"}, "as where peft wrote it; name the rope settings of its training"),
        ({**ROPE, "lora_rank": 8}, "lora_rank=8: the adapter has lora_rank=4; use that value"),
        ({**ROPE, "device": "gpux"}, "device=gpux: .*; give cpu, or a device that torch sees here"),
        ({**ROPE, "device_map": "auto"}, r"device_map: unknown field \(did you mean device\?\)"),
        ({**ROPE, "torch_dtype": torch.bfloat16}, r"torch_dtype: unknown field \(did you mean dtype\?\)"),
    ],
)
def test_what_is_missing_or_wrong_is_named(folder: Path, settings: dict[str, Any], error: str) -> None:
    with pytest.raises(pm.UserError, match=error):
        pm.load_model_with_lora(lora_path=folder, **settings)


def test_a_plain_adapter_needs_no_rope_settings(folder: Path) -> None:
    model, _ = pm.load_model_with_lora(lora_path=folder, patch_rope=False)
    assert isinstance(model, peft.PeftModel)


def test_other_readers_name_the_way(folder: Path) -> None:
    with pytest.raises(pm.UserError, match=r"no parallelmind.json in it; if peft wrote it, load it once"):
        read_adapter(folder)


def test_an_initialisation_that_changes_the_base_is_refused(base: str, tmp_path: Path) -> None:
    model, tokenizer = pm.load_model_with_lora(base, **ROPE)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(pm.UserError, match='init_lora_weights="?pissa"? has changed the base'):
        pm.save_adapter(peft.get_peft_model(model, settings), tokenizer, tmp_path / "own")
