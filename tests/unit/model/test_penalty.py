"""The learned sibling penalty belongs to an adapter: it is trained, saved, loaded and moved with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from added import attach_by_copy, save_two
from flexing import long_batch, real_logits
from peft import AutoPeftModelForCausalLM
from penalties import LEARNED, LORA, learning
from safetensors.torch import load_file
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from torch import Tensor, nn

from parallelmind.config import ModelConfig, OptimizerConfig, RopeConfig, TrainConfig, resolve
from parallelmind.errors import UserError
from parallelmind.model.adapter import (
    add_lora,
    attach,
    load_adapter,
    load_model_with_lora,
    read_saved,
    resume_adapter,
    save_adapter,
)
from parallelmind.model.base_identity import base_identity
from parallelmind.model.export import export
from parallelmind.model.fingerprint import fingerprint
from parallelmind.model.patch import patch, unpatch
from parallelmind.model.penalty import NAME, RATE, START, penalty_weights
from parallelmind.training.step import make_optimizer, set_learning_rate


def patched(rope: RopeConfig = LEARNED) -> Any:
    model = tiny_llama()
    patch(model, rope)
    return model


def logits(model: nn.Module) -> Tensor:
    return real_logits(model.eval(), long_batch(LEARNED), LEARNED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in `base`, and two adapters in `0` and `1`."""
    root = tmp_path_factory.mktemp("penalties")
    return save_two(root, lambda seed: learning(tiny_llama(), seed=seed), LEARNED, LORA)


def test_a_loaded_adapter_has_its_penalties(folder: Path) -> None:
    model, _ = load_model_with_lora(lora_path=folder / "0")
    expected = learning(tiny_llama())
    assert torch.equal(logits(model), logits(expected))
    manifest = json.loads((folder / "0" / "parallelmind.json").read_text())
    assert manifest["rope"]["sibling_penalty"] == "learned"
    assert not any(NAME in name for name in manifest["base"]["weights"])
    with pytest.raises(UserError, match=r"sibling_penalty=3.0: the adapter has sibling_penalty=learned"):
        load_model_with_lora(lora_path=folder / "0", sibling_penalty=3.0)


def test_a_resumed_adapter_trains_its_penalties_further(folder: Path) -> None:
    resumed = resume_adapter(patched(), tiny_tokenizer(), folder / "0", LORA)
    expected = penalty_weights(learning(tiny_llama()))
    found = penalty_weights(resumed)
    assert len(found) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_peft_loads_the_adapter_without_penalties(folder: Path) -> None:
    plain = AutoPeftModelForCausalLM.from_pretrained(folder / "0")
    adapted = learning(tiny_llama()).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-4)


def test_without_an_adapter_every_head_has_the_starting_value(folder: Path) -> None:
    fixed = patched(RopeConfig(sibling_penalty=START))
    model = load_adapter(patched(), tiny_tokenizer(), folder / "0")
    assert (logits(model) - logits(fixed)).abs().max() > 0.1
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(fixed), rtol=1e-4, atol=1e-4)


def test_several_adapters_on_a_model_have_their_own_penalties(folder: Path) -> None:
    model, expected = patched(), patched()
    for name in ("v0", "v1"):
        model = attach_by_copy(model, folder / name[1:], name)
        expected = attach(expected, read_saved(expected, tiny_tokenizer(), folder / name[1:]), name).eval()
    found = []
    for name in ("v0", "v1", "v0"):
        model.set_adapter(name)
        expected.set_adapter(name)
        found.append(logits(model))
        assert torch.equal(found[-1], logits(expected))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert fingerprint("", model, "v0", LEARNED) != fingerprint("", model, "v1", LEARNED)
    model.delete_adapter("v0")
    model.set_adapter("v1")
    assert torch.equal(logits(model), found[1])


def test_unpatch_removes_the_penalties() -> None:
    model, expected = patched(), tiny_llama()
    unpatch(model)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in expected.named_modules()]
    assert base_identity(patched(), tiny_tokenizer()) == base_identity(expected, tiny_tokenizer())


def test_isolated_branches_have_no_penalties() -> None:
    model = patched(RopeConfig(sibling_penalty="learned", visibility="isolated"))
    assert not any(NAME in name for name, _ in model.named_modules())


def test_penalties_are_trained_at_a_rate_of_their_own() -> None:
    model = learning(tiny_llama())
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=1e-3, weight_decay=0.5))
    set_learning_rate(optimizer, 2e-4)
    lora, penalties = optimizer.param_groups
    assert (lora["lr"], penalties["lr"]) == (2e-4, 2e-4 * RATE)
    assert (lora["weight_decay"], penalties["weight_decay"]) == (0.5, 0)
    assert [weight.shape for weight in penalties["params"]] == [(4,), (4,)]
    before = [weight.detach().clone() for weight in penalty_weights(model)]
    logits_loss = model(input_ids=torch.tensor([[5, 6]])).logits.sum()
    (logits_loss + sum(weight.sum() for weight in penalty_weights(model))).backward()
    optimizer.step()
    for weight, old in zip(penalty_weights(model), before, strict=True):
        torch.testing.assert_close(old - weight, torch.full((4,), 0.02), rtol=1e-3, atol=0)


def test_what_cannot_hold_penalties_is_refused() -> None:
    for field in ("tuning", "sharding"):
        with pytest.raises(
            UserError, match=rf"sibling_penalty=learned: .*; set a number, or drop {field}=full"
        ):
            resolve(TrainConfig, {"data_path": "x", field: "full", "sibling_penalty": "learned"})
    for wrong in ("-1", "much"):
        with pytest.raises(UserError, match=rf"sibling_penalty={wrong}: .*'learned'"):
            resolve(TrainConfig, {"data_path": "x"}, [f"sibling_penalty={wrong}"])
    assert resolve(TrainConfig, {"data_path": "x"}, ["sibling_penalty=learned"]).rope == LEARNED
    model = tiny_llama()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match=r"sibling_penalty=learned: .*flex_attention.*; choose sdpa or eager"):
        patch(model, LEARNED)


def test_only_a_lone_branch_is_exported(tmp_path: Path) -> None:
    rope = LEARNED.model_copy(update={"rope_2d_ratio": 0.0})
    base = ModelConfig(base_model=save_tiny(tmp_path / "base"))
    save_adapter(learning(tiny_llama(), rope), tiny_tokenizer(), tmp_path / "adapter", base, rope, LORA)
    with pytest.raises(UserError, match=r"sibling_penalty=learned, and plain weights .*\(lone=true\)"):
        export(tmp_path / "adapter", tmp_path / "merged")
    export(tmp_path / "adapter", tmp_path / "lone", lone=True)
    assert not any(NAME in name for name in load_file(tmp_path / "lone" / "model.safetensors"))


def test_an_added_adapter_starts_at_the_starting_value() -> None:
    adapted = add_lora(patched(), LORA, seed=0)
    assert all((weight == START).all() for weight in penalty_weights(adapted))
