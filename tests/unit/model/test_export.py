"""`workloads.export`: logits of the merged model in plain transformers, and refused adapters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import IDS, logits
from peft import AutoPeftModelForCausalLM
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from parallelmind.config import LoraConfig, ModelConfig, RopeConfig
from parallelmind.errors import UserError
from parallelmind.model import export as exporting
from parallelmind.model.adapter import add_lora, load_model_with_lora, save_adapter
from parallelmind.model.full_model import save_model
from parallelmind.model.patch_state import is_patched, rope_config
from workloads import export
from workloads.generate import command as generate

ISOLATED = RopeConfig(rope_2d_ratio=0.0, visibility="isolated", branch_stride=16)


def adapter(folder: Path, rope: RopeConfig, tied: bool = False, dtype: str = "float32", **lora: Any) -> Path:
    """Save a base model and an adapter with random weights under `folder`; returns the adapter's folder."""
    base = ModelConfig(base_model=save_tiny(folder / "base", tie_word_embeddings=tied), dtype=dtype)
    model, tokenizer = load_model_with_lora(base.base_model, dtype=dtype, **rope.model_dump())
    config = LoraConfig.model_validate({"lora_rank": 4, **lora})
    adapted = add_lora(model, config, seed=0)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    save_adapter(adapted, tokenizer, folder / "adapter", base, rope, config, {"run": "abc"})
    return folder / "adapter"


@torch.no_grad()
def plain_logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("rope", "settings"),
    [
        (ISOLATED, {}),
        (ISOLATED, {"use_dora": True, "use_rslora": True, "tied": True, "dtype": "bfloat16"}),
        (RopeConfig(patch_rope=False), {"lora_init": "pissa"}),
    ],
)
def test_plain_transformers_computes_the_adapters_logits(
    tmp_path: Path, rope: RopeConfig, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    lora_path, output = adapter(tmp_path, rope, **settings), tmp_path / "merged"
    export.main([f"lora_path={lora_path}", f"output_path={output}"])
    assert str(output) in capsys.readouterr().out
    expected = plain_logits(load_model_with_lora(lora_path=lora_path)[0])
    plain = AutoModelForCausalLM.from_pretrained(output).eval()
    assert not is_patched(plain)
    assert plain.dtype == torch.float32
    assert (plain_logits(plain) - expected).abs().max() <= 5e-4 * expected.abs().max()
    assert (
        plain_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")) - expected
    ).abs().max() > 0.1
    assert (
        AutoTokenizer.from_pretrained(output).chat_template
        == AutoTokenizer.from_pretrained(tmp_path / "base").chat_template
    )
    for path in output.iterdir():
        assert path.name == "parallelmind.json" or str(tmp_path).encode() not in path.read_bytes()


def test_the_merged_model_keeps_the_placement_of_the_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_path, output = adapter(tmp_path, ISOLATED), tmp_path / "merged"
    exporting.export(lora_path, output)
    assert rope_config(load_model_with_lora(str(output))[0]) == ISOLATED
    texts = []
    for source in (f"base_model={output}", f"lora_path={lora_path}"):
        generate.main([source, "prompt=who is in", "max_new_tokens=4", "ignore_eos=true"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_2d_ratio": 0.5},
        {"rope_2d_ratio": 1.0, "visibility": "isolated", "positions": "flat"},
        {"rope_2d_ratio": 0.0, "branch_angle": "alone", "positions": "flat"},
    ],
)
def test_a_lone_branch_is_exact_in_plain_libraries(
    tmp_path: Path, rope: dict[str, Any], merge: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    lora_path, output = adapter(tmp_path, RopeConfig(**rope)), tmp_path / "plain"
    export.main(
        [f"lora_path={lora_path}", f"output_path={output}", "lone=true", f"merge={str(merge).lower()}"]
    )
    assert "lost: siblings" in capsys.readouterr().out
    patched, _ = load_model_with_lora(lora_path=lora_path)
    expected = exporting._branch_logits(patched, RopeConfig(**rope), IDS[0])
    auto_class = AutoModelForCausalLM if merge else AutoPeftModelForCausalLM
    actual = plain_logits(auto_class.from_pretrained(output).eval())[0]
    assert (actual - expected).abs().max() <= (5e-4 * expected.abs().max() if merge else 1e-5)
    base = plain_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))[0]
    assert (base - expected).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(output).chat_template
    export.main([f"lora_path={lora_path}", f"output_path={output}", "lone=true"])  # in place of an export


def test_a_plain_adapter_keeps_its_siblings_in_parallelmind(tmp_path: Path) -> None:
    rope = RopeConfig(rope_2d_ratio=0.5)
    lora_path = adapter(tmp_path, rope)
    exporting.export(lora_path, tmp_path / "plain", lone=True, merge=False)
    first, second = (load_model_with_lora(lora_path=path)[0] for path in (lora_path, tmp_path / "plain"))
    assert rope_config(second) == rope
    torch.testing.assert_close(logits(first), logits(second))


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_2d_ratio": 0.5},
            r"lora_path=.*rope_2d_ratio=0\.5, and plain weights cannot .*\(lone=true\).*rope_2d_ratio=0",
        ),
        (
            {"rope_2d_ratio": 0.0, "positions": "flat"},
            r"lora_path=.*positions=flat, and plain weights .*positions=time",
        ),
    ],
)
def test_adapters_that_need_the_patch_are_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rope: dict[str, Any], message: str
) -> None:
    lora_path = adapter(tmp_path, RopeConfig(**rope))
    monkeypatch.setattr(exporting, "load_model_with_lora", None)
    with pytest.raises(UserError, match=message) as error:
        export.main([f"lora_path={lora_path}", f"output_path={tmp_path / 'merged'}"])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "merged").exists()


def test_a_merge_that_changes_the_logits_leaves_no_folder(tmp_path: Path) -> None:
    lora_path = adapter(
        tmp_path, ISOLATED, tied=True, lora_targets="lm_head"
    )  # merging would change the tied embedding
    with pytest.raises(UserError, match="exported, its logits differ by .*load_model_with_lora"):
        exporting.export(lora_path, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("adapter", "adapter: is lora_path="),
        ("link", "link: is lora_path="),
        ("adapter/../adapter", "is lora_path="),
        ("adapter/merged", "lies in lora_path="),
        (".", "holds lora_path="),
        ("base", "base: is base_model="),
        ("other", "other: holds an earlier adapter, which an export does not replace"),
        ("model", "model: holds an earlier model, which an export does not replace"),
        ("notes", "notes: holds other files"),
        ("notes/file", "file: holds other files"),
    ],
)
def test_an_existing_folder_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, message: str
) -> None:
    lora_path = adapter(tmp_path, ISOLATED)
    (tmp_path / "link").symlink_to(lora_path)
    shutil.copytree(lora_path, tmp_path / "other")
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "model", ModelConfig(), ISOLATED)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "file").touch()
    before = content(tmp_path)
    monkeypatch.setattr(exporting, "load_model_with_lora", None)
    with pytest.raises(UserError, match=f"output_path=.*{message}") as error:
        export.main([f"lora_path={lora_path}", f"output_path={tmp_path / output}"])
    assert "\n" not in str(error.value)
    assert content(tmp_path) == before


def test_an_earlier_export_is_replaced_unless_it_holds_something_else(tmp_path: Path) -> None:
    lora_path = adapter(tmp_path, ISOLATED)
    exporting.export(lora_path, tmp_path / "merged")
    exporting.export(lora_path, tmp_path / "merged")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "merged").iterdir()} == {0o644}
    (tmp_path / "merged" / "notes").touch()
    with pytest.raises(UserError, match="also holds notes"):
        exporting.export(lora_path, tmp_path / "merged")
