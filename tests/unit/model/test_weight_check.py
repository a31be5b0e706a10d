"""A base model whose files lack weights, or hold other or damaged ones, is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_llama
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

from parallelmind.config import ModelConfig
from parallelmind.errors import UserError, UserNotice
from parallelmind.model.base_model import load_base

Change = Callable[[Path], object]
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"
PROJECTION = "model.layers.0.mlp.up_proj.weight"


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Edit the saved weights."""

    def edit(folder: Path) -> None:
        values = load_file(folder / WEIGHTS)
        change(values)
        save_file(values, folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / PICKLE)
    (folder / WEIGHTS).unlink()


def truncated(name: str) -> Change:
    def cut(folder: Path) -> None:
        if name == PICKLE:
            as_pickle(folder)
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


def replaced(model_class: Any) -> Change:
    """Save a model of another class in place of the causal language model."""
    return lambda folder: model_class(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)


def quantised(folder: Path) -> None:
    """Weights in eight bits with a scale, as transformers saves them."""

    def edit(values: dict[str, torch.Tensor]) -> None:
        weight = values[PROJECTION] / 0.1
        values |= {
            PROJECTION: weight.to(torch.float8_e4m3fn),
            f"{PROJECTION}_scale_inv": torch.full((1, 1), 0.1),
        }

    weights(edit)(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))


def with_adapter(folder: Path) -> None:
    """An adapter of peft in the folder of the base, which transformers adds to the model."""
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


class _Code:
    """Runs a command when it is unpickled without care."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(_Code.ran),)

    ran: Path


def code(save: Callable[[Any, Path], object]) -> Change:
    def write(folder: Path) -> None:
        _Code.ran = folder / "ran"
        (folder / WEIGHTS).unlink()
        save({"lm_head.weight": _Code()}, folder / PICKLE)

    return write


def index(content: Any) -> Change:
    def write(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))

    return write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weights(lambda w: w.pop("lm_head.weight")), r"its files lack lm_head\.weight; give"),
        (weights(lambda w: [w.pop(key) for key in list(w)[:3]]), "its files lack .* and 2 more; give"),
        (
            weights(lambda w: w.update({"lm_head.weight": torch.zeros(301, 64)})),
            r"lm_head\.weight has shape \[301, 64\] in its files, and config\.json asks for \[300, 64\];",
        ),
        (replaced(LlamaForSequenceClassification), r"its files lack lm_head\.weight; give"),
        (replaced(LlamaModel), r"its files lack lm_head\.weight; give"),
        (quantised, r"its files hold .*up_proj\.weight_scale_inv, which the layer .* not quantised"),
        (
            weights(lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
            r"its files hold .*q_proj\.bias, which the layer of config\.json does not use; give",
        ),
        (with_adapter, r"holds adapter_config\.json, so an adapter would be a part of the base; give"),
        (
            lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
            r"cannot be loaded \(model\.safetensors is a pointer of Git LFS; run `git lfs pull`",
        ),
        (truncated(WEIGHTS), r"cannot be loaded \(model\.safetensors: .*not fully covered\); give"),
        (truncated(PICKLE), r"cannot be loaded \(pytorch_model\.bin is damaged or holds code"),
        (
            code(torch.save),
            r"cannot be loaded \(pytorch_model\.bin is damaged or holds code, which is not run",
        ),
        (
            code(lambda values, file: file.write_bytes(pickle.dumps(values))),
            r"cannot be loaded \(pytorch_model\.bin is damaged or holds code, which is not run; save it",
        ),
        (index({}), r"cannot be loaded \(model\.safetensors\.index\.json is damaged \(KeyError"),
        (
            index({"metadata": {}, "weight_map": {"a": "shard.safetensors"}}),
            r"shard\.safetensors is missing\)",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"model_type":"llama","num_attention_heads":0}'
            ),
            "",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"model_type":"llama","rope_scaling":{"rope_type":"unknown"}}'
            ),
            r"cannot be loaded \(KeyError\('unknown'\)\)",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    ],
)
def test_unfit_files_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    save_tiny(tmp_path)
    change(tmp_path)
    with pytest.raises(UserError, match=f"base_model=.*{message}") as error:
        load_base(ModelConfig(base_model=str(tmp_path)))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", [lambda folder: None, as_pickle])
def test_whole_files_load_without_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Change, tied: bool
) -> None:
    save_tiny(tmp_path, tie_word_embeddings=tied)
    change(tmp_path)
    capfd.readouterr()
    model, _ = load_base(ModelConfig(base_model=str(tmp_path)))
    assert capfd.readouterr() == ("", "")
    for name, weight in tiny_llama(tie_word_embeddings=tied).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_unused_weights_are_a_notice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path, tie_word_embeddings=True)
    replaced(LlamaForSequenceClassification)(tmp_path)
    capfd.readouterr()
    with pytest.warns(UserNotice, match=r"base_model=.*: the model does not use score\.weight of its files"):
        load_base(ModelConfig(base_model=str(tmp_path)))
    assert "LOAD REPORT" not in "".join(capfd.readouterr())
