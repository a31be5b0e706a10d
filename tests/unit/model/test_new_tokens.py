"""Tokens that a training adds: their rows are trained, saved with the adapter, loaded and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import looping
import pytest
import torch
from adapting import ROPE, branch_logits, lora_config
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import parallelmind as pm
from parallelmind.config import ModelConfig, RopeConfig, TrainConfig, resolve
from parallelmind.data.tables import TokenRecord
from parallelmind.errors import UserError
from parallelmind.layout import Tokens
from parallelmind.model import export as exporting
from parallelmind.model.adapter import add_lora, load_model_with_lora, resume_adapter, save_adapter
from parallelmind.model.base_model import load_base, load_base_config, load_meta_model, load_tokenizer
from parallelmind.model.full_model import save_model
from parallelmind.model.manifest import read_manifest
from parallelmind.model.weights import trained_weights

TOKENS = ["<tool>", "</tool>", "→→"]
SIZE = len(tiny_tokenizer())
NEW_IDS = [SIZE, SIZE + 1, SIZE + 2]
INPUT = torch.tensor([[SIZE, 11, SIZE + 1, 13, SIZE + 2, 15]])


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> ModelConfig:
    return ModelConfig(
        base_model=save_tiny(tmp_path / "base", tie_word_embeddings=request.param), add_tokens=TOKENS
    )


@torch.no_grad()
def logits(model: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setattr("adapting.IDS", INPUT)
    return branch_logits(model)


def trained(base: ModelConfig, rope: RopeConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    model, tokenizer = load_model_with_lora(base.base_model, add_tokens=TOKENS, **rope.model_dump())
    adapted = add_lora(model, lora_config(), seed=0).train()
    monkeypatch.setattr("adapting.IDS", INPUT)
    optimizer = torch.optim.AdamW([w for w in adapted.parameters() if w.requires_grad], lr=0.02)
    for _ in range(2):
        cross_entropy(branch_logits(adapted)[0], INPUT[0].roll(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval(), tokenizer


def test_new_rows_are_the_mean_of_the_others_everywhere(base: ModelConfig) -> None:
    model, tokenizer = load_base(base)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == NEW_IDS
    assert tokenizer.encode("who<tool>is", add_special_tokens=False).count(SIZE) == 1
    before = tiny_llama(tie_word_embeddings=model.config.tie_word_embeddings)
    for name in ("get_input_embeddings", "get_output_embeddings"):
        rows, old = getattr(model, name)().weight, getattr(before, name)().weight
        assert torch.equal(rows[:SIZE], old)
        torch.testing.assert_close(rows[SIZE:], old.mean(0).expand(3, -1))
    assert load_base_config(base).vocab_size == load_meta_model(base).config.vocab_size == SIZE + 3
    assert len(load_tokenizer(base)) == model.config.vocab_size == SIZE + 3


def test_only_new_rows_of_the_embeddings_are_trained_and_a_new_load_has_them(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = trained(base, ROPE, monkeypatch)
    is_tied = model.config.tie_word_embeddings
    deltas = {name: w.shape for name, w in trained_weights(model).items() if "lora_" not in name}
    assert list(deltas.values()) == [(3, 64)] * (1 if is_tied else 2)
    save_adapter(model, tokenizer, tmp_path / "adapter", base, ROPE, lora_config())
    assert read_manifest(tmp_path / "adapter").add_tokens == TOKENS
    assert AutoTokenizer.from_pretrained(tmp_path / "adapter").convert_tokens_to_ids(TOKENS) == NEW_IDS
    loaded, loaded_tokenizer = load_model_with_lora(lora_path=tmp_path / "adapter")
    assert torch.equal(logits(loaded, monkeypatch), logits(model, monkeypatch))
    plain, _ = load_model_with_lora(base.base_model, add_tokens=TOKENS, **ROPE.model_dump())
    assert (logits(loaded, monkeypatch) - logits(plain, monkeypatch)).abs().max() > 0.1
    resumed = resume_adapter(plain, tokenizer, tmp_path / "adapter", lora_config())
    assert torch.equal(logits(resumed.eval(), monkeypatch), logits(model, monkeypatch))
    assert {name for name, w in resumed.named_parameters() if w.requires_grad} == {
        name for name, w in model.named_parameters() if w.requires_grad
    }
    sample = pm.Sample(main="<tool> the", branches=["</tool> who", "is"])
    texts = pm.generate(loaded, loaded_tokenizer, sample, max_new_tokens=4, ignore_eos=True)
    assert texts == pm.generate(model, tokenizer, sample, max_new_tokens=4, ignore_eos=True)


def test_the_merged_model_has_the_new_tokens(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = RopeConfig(rope_2d_ratio=0.0, visibility="isolated", branch_stride=16)
    model, tokenizer = trained(base, rope, monkeypatch)
    save_adapter(model, tokenizer, tmp_path / "adapter", base, rope, lora_config())
    exporting.export(tmp_path / "adapter", tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    adapted, _ = load_model_with_lora(lora_path=tmp_path / "adapter")
    expected, merged = (m.get_input_embeddings().weight for m in (adapted, plain))
    assert torch.equal(merged, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids(TOKENS) == NEW_IDS
    head = plain.get_output_embeddings().weight
    assert (head is merged) == model.config.tie_word_embeddings


def test_a_whole_model_is_saved_with_the_new_tokens(base: ModelConfig, tmp_path: Path) -> None:
    model, tokenizer = load_base(base)
    save_model(model, tokenizer, tmp_path / "model", base, ROPE)
    loaded, loaded_tokenizer = load_model_with_lora(str(tmp_path / "model"))
    assert len(loaded_tokenizer) == loaded.config.vocab_size == SIZE + 3


def test_a_stopped_training_resumes_bit_for_bit(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [Tokens.of([], [[5 + i % 7, SIZE, 30, SIZE + 1, 2]]) for i in range(36)]
    monkeypatch.setattr(looping, "ROWS", [TokenRecord(text, standalone=True) for text in texts])
    settings = looping.config()

    def fresh_model() -> Any:
        model, _ = load_model_with_lora(base.base_model, add_tokens=TOKENS, **settings.rope.model_dump())
        return add_lora(model, settings.lora, seed=0)

    undisturbed = looping.run(settings, tmp_path / "whole", model=fresh_model())
    looping.run(settings, tmp_path / "stopped", looping.Recorder(stop_at=4), fresh_model())
    resumed = looping.run(settings, tmp_path / "stopped", model=fresh_model())
    assert min(resumed.hooks.metrics) > 1
    looping.assert_same_weights(resumed.weights, undisturbed.weights)
    start = trained_weights(fresh_model())
    deltas = [name for name in start if "trainable_tokens_delta" in name]
    assert deltas
    assert not any(torch.equal(resumed.weights[name], start[name]) for name in deltas)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<new>", "</s>"], "add_tokens=</s>: is a token of the tokenizer already; leave it out"),
        (["<new>", "<new>"], "add_tokens=<new>: is a token of the tokenizer already; leave it out"),
        ([" "], 'add_tokens=" ": is no text; leave it out'),
    ],
)
def test_a_token_that_cannot_be_added_is_refused(tmp_path: Path, tokens: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_tokenizer(ModelConfig(base_model=save_tiny(tmp_path), add_tokens=tokens))
    assert str(error.value) == message


def test_other_new_tokens_than_the_adapters_are_refused(
    base: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = trained(base, ROPE, monkeypatch)
    save_adapter(model, tokenizer, tmp_path / "adapter", base, ROPE, lora_config())
    with pytest.raises(UserError, match="add_tokens=.*: the adapter has add_tokens=.*; use that value"):
        load_model_with_lora(lora_path=tmp_path / "adapter", add_tokens=["<a>", "<b>", "<c>"])


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"add_tokens=\[.*not supported with quantize=4bit; set quant"):
        ModelConfig(add_tokens=["<new>"], quantize="4bit")
    with pytest.raises(UserError, match=r"sharding=full: .*add_tokens"):
        resolve(TrainConfig, {"data_path": "d", "add_tokens": ["<new>"], "sharding": "full"})
    assert ModelConfig(add_tokens=[]).fingerprint() == ModelConfig().fingerprint()
