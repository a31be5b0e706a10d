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
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_llama
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel

from parallelmind.config import ModelConfig
from parallelmind.errors import UserError, UserNotice
from parallelmind.model.base_model import load_base

Change = Callable[[Path], object]
WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"


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
