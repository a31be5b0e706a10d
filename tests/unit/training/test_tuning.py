"""Ways of training beside plain LoRA: its variants, the whole model, going on from an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import ROPE, allclose_logits, logits, logits_in_fresh_process, lora_config, patched_llama, train
from safetensors.torch import load_file
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from torch import Tensor

from parallelmind.config import ModelConfig, TrainConfig
from parallelmind.errors import UserError
from parallelmind.model.adapter import (
    add_lora,
    load_model_with_lora,
    resume_adapter,
    save_adapter,
    save_trained,
)
from parallelmind.model.manifest import read_manifest
from parallelmind.model.patch import patch
from parallelmind.model.patch_state import rope_config
from parallelmind.model.weights import load_weights, trained_weights

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rslora-dora": {"use_rslora": True, "use_dora": True},
    "pissa": {"lora_init": "pissa"},
    "pissa-rslora": {"lora_init": "pissa", "use_rslora": True},
    "pissa-dora": {"lora_init": "pissa", "use_dora": True},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_starts_as_the_base_learns_and_comes_back(
    base: ModelConfig, tmp_path: Path, settings: dict[str, Any]
) -> None:
    before, model = logits(patched_llama()), add_lora(patched_llama(), lora_config(**settings), seed=0)
    assert allclose_logits(logits(model), before)
    expected = logits(train(model))
    assert (expected - before).abs().max() > 0.1
    save_adapter(model, tiny_tokenizer(), tmp_path / "adapter", base, ROPE, lora_config(**settings))
    loaded, _ = load_model_with_lora(lora_path=tmp_path / "adapter")
    assert allclose_logits(logits(loaded), expected)
    manifest, written = (
        read_manifest(tmp_path / "adapter"),
        json.loads((tmp_path / "adapter/adapter_config.json").read_text()),
    )
    assert manifest.lora is not None
    assert manifest.lora.lora_init == "zero"
    assert manifest.lora.lora_rank == written["r"] == (8 if "lora_init" in settings else 4)
    assert (manifest.lora.use_rslora, manifest.lora.use_dora) == (written["use_rslora"], written["use_dora"])


def test_lora_stays_float32_on_a_float16_base() -> None:
    model = train(add_lora(patched_llama().to(torch.float16), lora_config(use_dora=True), seed=0), steps=1)
    assert {weight.dtype for weight in trained_weights(model).values()} == {torch.float32}
    assert logits(model).dtype == torch.float16


def run(base: ModelConfig, **settings: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {"data_path": "-", **base.model_dump(), **ROPE.model_dump(), **settings}
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_full_model_is_loaded_with_its_rope_settings(tmp_path: Path, tied: bool) -> None:
    base = ModelConfig(base_model=save_tiny(tmp_path / "base", tie_word_embeddings=tied))
    model, tokenizer = load_model_with_lora(base.base_model, **ROPE.model_dump())
    before = logits(model)
    expected = logits(train(model))
    assert ("lm_head.weight" in trained_weights(model)) == (not tied)
    save_trained(model, tokenizer, tmp_path / "model", run(base, tuning="full"), {"metrics": {"loss": 1.5}})
    model_dir = str(tmp_path / "model")
    reloaded = (
        logits_in_fresh_process(base_model=model_dir) if tied else logits(load_model_with_lora(model_dir)[0])
    )
    assert torch.equal(reloaded, expected)
    assert (reloaded - before).abs().max() > 0.1
    manifest = read_manifest(tmp_path / "model", "base_model")
    assert (manifest.lora, manifest.rope, manifest.base_model) == (None, ROPE, base.base_model)
    assert "model.safetensors" in manifest.files
    assert "| loss | 1.5 |" in (tmp_path / "model/README.md").read_text()
    for path in (tmp_path / "model").iterdir():
        assert path.name == "parallelmind.json" or str(tmp_path).encode() not in path.read_bytes()


def test_weights_from_elsewhere_are_saved_in_place_of_the_models_own(
    base: ModelConfig, tmp_path: Path
) -> None:
    for name, settings in (
        ("model", {"tuning": "full"}),
        ("adapter", {"lora_rank": 4}),
        ("pissa", {"lora_init": "pissa"}),
    ):
        config = run(base, **{"lora_rank": 4, **settings})
        model = patched_llama() if name == "model" else add_lora(patched_llama(), config.lora, seed=0)
        gathered = {name: weight.clone() for name, weight in trained_weights(train(model)).items()}
        expected = logits(model)
        for weight in trained_weights(model).values():
            weight.zero_()
        save_trained(model, tiny_tokenizer(), tmp_path / name, config, weights=gathered)
        where = {"base_model": str(tmp_path / name)} if name == "model" else {"lora_path": tmp_path / name}
        assert allclose_logits(logits(load_model_with_lora(**where)[0]), expected)


def test_a_whole_model_is_filled_like_an_adapter() -> None:
    saved = {name: weight.clone() for name, weight in trained_weights(tiny_llama(seed=1)).items()}
    model = patched_llama()
    load_weights(model, saved, "checkpoint")
    assert torch.equal(logits(model), logits_of_seed_one())
    with pytest.raises(UserError, match="^checkpoint: .*differ in lm_head.weight"):
        load_weights(model, {**saved, "lm_head.weight": torch.zeros(1, 64)}, "checkpoint")
    saved.pop("lm_head.weight")
    with pytest.raises(UserError, match="^checkpoint: .*differ in lm_head.weight"):
        load_weights(model, saved, "checkpoint")


def logits_of_seed_one() -> Tensor:
    model = tiny_llama(seed=1)
    patch(model, ROPE)
    return logits(model)


@pytest.fixture(scope="module")
def whole(base: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "model"
    save_trained(patched_llama(), tiny_tokenizer(), folder, run(base, tuning="full"))
    return folder


def test_a_whole_models_placement_is_the_default_and_holds(whole: Path) -> None:
    assert rope_config(load_model_with_lora(str(whole))[0]) == ROPE
    assert rope_config(load_model_with_lora(str(whole), rope_2d_ratio=0.5)[0]) == ROPE
    with pytest.raises(UserError, match="branch_stride=128: the model has branch_stride=16"):
        load_model_with_lora(str(whole), branch_stride=128)


def test_a_whole_model_and_an_adapter_are_not_taken_for_each_other(
    base: ModelConfig, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"lora_path=.*holds a whole model.*base_model"):
        load_model_with_lora(lora_path=whole)
    save_adapter(
        add_lora(patched_llama(), lora_config(), seed=0),
        tiny_tokenizer(),
        tmp_path / "adapter",
        base,
        ROPE,
        lora_config(),
    )
    with pytest.raises(UserError, match=r"base_model=.*holds an adapter.*lora_path"):
        load_model_with_lora(str(tmp_path / "adapter"))


def test_a_changed_file_of_a_whole_model_is_refused(base: ModelConfig, tmp_path: Path) -> None:
    save_trained(patched_llama(), tiny_tokenizer(), tmp_path / "model", run(base, tuning="full"))
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match=r"base_model=.*: model\.safetensors is .*copy the folder again"):
        load_model_with_lora(str(tmp_path / "model"))


@pytest.fixture(scope="module")
def saved_adapter(base: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model = train(add_lora(patched_llama(), lora_config(), seed=0))
    save_adapter(model, tiny_tokenizer(), folder, base, ROPE, lora_config())
    return folder, logits(model)


def test_an_adapter_is_trained_further(base: ModelConfig, saved_adapter: tuple[Path, Tensor]) -> None:
    model = resume_adapter(
        patched_llama().to(torch.bfloat16), tiny_tokenizer(), saved_adapter[0], lora_config(lora_dropout=0.1)
    )
    assert {weight.dtype for weight in trained_weights(model).values()} == {torch.float32}
    model = resume_adapter(patched_llama(), tiny_tokenizer(), saved_adapter[0], lora_config(lora_dropout=0.1))
    assert torch.equal(logits(model.eval()), saved_adapter[1])
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}
    expected = {
        name
        for name, _ in add_lora(patched_llama(), lora_config(), seed=0).named_parameters()
        if "lora_" in name
    }
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == expected
    assert (logits(train(model)) - saved_adapter[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 16}, "lora_rank=16: the adapter has lora_rank=4"),
        ({"use_dora": True}, "use_dora=true: the adapter has use_dora=false"),
        ({"lora_init": "pissa"}, "lora_init=pissa: the adapter has lora_init=zero"),
    ],
)
def test_resuming_with_other_settings_is_rejected(
    saved_adapter: tuple[Path, Tensor], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resume_adapter(patched_llama(), tiny_tokenizer(), saved_adapter[0], lora_config(**settings))


def test_resuming_with_other_positions_is_rejected(saved_adapter: tuple[Path, Tensor]) -> None:
    model = tiny_llama()
    patch(model, ROPE.model_copy(update={"positions": "flat"}))
    with pytest.raises(UserError, match="positions=flat: the adapter has positions=time"):
        resume_adapter(model, tiny_tokenizer(), saved_adapter[0], lora_config())


def test_only_safetensors_is_written(
    base: ModelConfig, saved_adapter: tuple[Path, Tensor], whole: Path
) -> None:
    assert set(load_file(saved_adapter[0] / "adapter_model.safetensors")) == set(
        trained_weights(add_lora(patched_llama(), lora_config(), seed=0))
    )
    names = [path.suffix for folder in (saved_adapter[0], whole) for path in folder.iterdir()]
    assert set(names) <= {".safetensors", ".json", ".jinja", ".md"}
