"""Adapters: initialisation, the saved folder, the manifest, the model card, and loading with checks."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapting import logits, logits_in_fresh_process, patched_llama
from peft import AutoPeftModelForCausalLM, PeftModel
from permissions import obeying_permissions
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from parallelmind.config import LoraConfig, ModelConfig, RopeConfig
from parallelmind.errors import UserError, UserNotice
from parallelmind.model.adapter import (
    add_lora,
    attach,
    load_adapter,
    load_model_with_lora,
    read_saved,
    resume_adapter,
    save_adapter,
)
from parallelmind.model.base_identity import BaseIdentity
from parallelmind.model.full_model import save_model
from parallelmind.model.manifest import base_config_hash, read_manifest
from parallelmind.model.patch import patch
from parallelmind.model.patch_state import rope_config
from parallelmind.model.smollm2 import smollm2_folder
from parallelmind.storage import sha256

ROPE = RopeConfig(rope_2d_ratio=0.5, branch_stride=16, visibility="isolated")
LORA = LoraConfig(lora_rank=4, lora_alpha=8)
Damage = Callable[[Path], object]


def trained(base: Any, config: LoraConfig = LORA, seed: int = 0) -> PeftModel:
    """An adapter with random B weights, as after training; a new adapter has no effect."""
    model = add_lora(base, config, seed=seed)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    return model.eval()


def lora_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if "lora_" in name}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def saved(base_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "adapter"
    save_adapter(
        trained(patched_llama(ROPE)),
        tiny_tokenizer(),
        folder,
        ModelConfig(base_model=base_folder),
        ROPE,
        LORA,
        {"run": "abc"},
    )
    return folder


def test_initialisation_depends_on_the_seed_and_keeps_the_global_generator() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = (lora_weights(add_lora(tiny_llama(), LORA, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_lora_is_float32_on_a_bfloat16_base() -> None:
    model = add_lora(tiny_llama().to(torch.bfloat16), LORA, seed=0)
    assert {weight.dtype for weight in lora_weights(model).values()} == {torch.float32}
    assert model.get_base_model().dtype == torch.bfloat16


def test_only_named_targets_are_adapted() -> None:
    model = add_lora(tiny_llama(), LoraConfig(lora_targets="q_proj, mlp.up_proj"), seed=0)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in lora_weights(model)} == {
        "q_proj",
        "up_proj",
    }


@pytest.mark.parametrize("targets", ["q_proj,qproj", "nothing", " , "])
def test_an_unknown_target_is_refused(targets: str) -> None:
    with pytest.raises(UserError, match=f"lora_targets={targets}.*choose from .*q_proj"):
        add_lora(tiny_llama(), LoraConfig(lora_targets=targets), seed=0)


def test_a_new_process_computes_the_same_logits(saved: Path) -> None:
    loaded = logits_in_fresh_process(lora_path=str(saved))
    assert torch.equal(loaded, logits(trained(patched_llama(ROPE))))
    assert (loaded - logits(patched_llama(ROPE))).abs().max() > 0.1


def test_the_manifest_describes_the_training(saved: Path, base_folder: str) -> None:
    manifest = read_manifest(saved)
    assert (manifest.base_model, manifest.rope, manifest.lora, manifest.extra) == (
        base_folder,
        ROPE,
        LORA,
        {"run": "abc"},
    )
    assert manifest.versions.keys() == {"parallelmind", "torch", "transformers", "peft"}
    assert manifest.files.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.suffix for path in saved.iterdir()} == {".json", ".safetensors", ".md"}


def test_saving_uses_no_network_and_keeps_the_users_name_of_the_base(
    base_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("saving used the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "cache"))
    shutil.copytree(base_folder, smollm2_folder())
    model, tokenizer = load_model_with_lora(base_folder, rope_2d_ratio=0.5)
    save_adapter(trained(model), tokenizer, tmp_path / "adapter", ModelConfig(), rope_config(model), LORA)
    for path in (tmp_path / "adapter").iterdir():
        assert base_folder.encode() not in path.read_bytes()
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(smollm2_folder())
    assert read_manifest(tmp_path / "adapter").base_model == "smollm2-135m"


def test_saving_replaces_an_adapter_and_leaves_no_other_files(
    saved: Path, base_folder: str, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    save_adapter(
        trained(patched_llama(ROPE), seed=1),
        tiny_tokenizer(),
        folder,
        ModelConfig(base_model=base_folder),
        ROPE,
        LORA,
    )
    assert read_manifest(folder).files != read_manifest(saved).files
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_saving_refuses_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        save_adapter(trained(patched_llama(ROPE)), tiny_tokenizer(), tmp_path, ModelConfig(), ROPE, LORA)
    assert (tmp_path / "thesis.tex").exists()


def test_saving_replaces_neither_a_whole_model_nor_an_adapter_with_other_files_beside_it(
    saved: Path, base_folder: str, tmp_path: Path
) -> None:
    def save(folder: Path) -> None:
        base = ModelConfig(base_model=base_folder)
        save_adapter(trained(patched_llama(ROPE)), tiny_tokenizer(), folder, base, ROPE, LORA)

    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "model", ModelConfig(), ROPE)
    with pytest.raises(UserError, match=r"folder=.*holds an earlier model, which an adapter does not"):
        save(tmp_path / "model")
    shutil.copytree(saved, tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"folder=.*also holds notes\.txt; move it away"):
        save(tmp_path / "adapter")


def test_a_model_is_not_saved_over_its_base(tmp_path: Path) -> None:
    save_model(tiny_llama(), tiny_tokenizer(), tmp_path / "model", ModelConfig(), ROPE)
    with pytest.raises(UserError, match=r"folder=.*: is base_model=.*; give another path"):
        save_model(
            tiny_llama(),
            tiny_tokenizer(),
            tmp_path / "model",
            ModelConfig(base_model=str(tmp_path / "model")),
            ROPE,
        )


@pytest.mark.parametrize("name", [".", "parallelmind.json", "adapter_model.safetensors"])
def test_an_adapter_that_may_not_be_read_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(saved, folder := tmp_path / "adapter")
    (folder / name).chmod(0)
    with obeying_permissions(), pytest.raises(UserError, match=r"lora_path=.*cannot be read \(Perm") as error:
        load_model_with_lora(lora_path=folder)
    (folder / name).chmod(0o755)
    assert "\n" not in str(error.value)


_SAVING = """
import sys
from tiny import tiny_llama, tiny_tokenizer
from parallelmind.config import LoraConfig, ModelConfig, RopeConfig
from parallelmind.model.adapter import add_lora, save_adapter
model = add_lora(tiny_llama(), LoraConfig(), seed=0)
save_adapter(model, tiny_tokenizer(), sys.argv[1], ModelConfig(), RopeConfig(), LoraConfig())
"""


@pytest.mark.slow
def test_the_saved_files_do_not_depend_on_the_hashes_of_the_process(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(here), str(here.parent / "platform")])
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", _SAVING, tmp_path / seed], env=env, check=True)
    files = [{path.name: path.read_bytes() for path in (tmp_path / seed).iterdir()} for seed in ("1", "2")]
    assert files[0] == files[1]


def edit(**fields: Any) -> Damage:
    def change(folder: Path) -> None:
        values = json.loads((folder / "parallelmind.json").read_text())
        (folder / "parallelmind.json").write_text(json.dumps({**values, **fields}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda folder: (folder / "parallelmind.json").unlink(), r"no parallelmind\.json"),
        (lambda folder: (folder / "parallelmind.json").write_text('{"rope"'), "is damaged"),
        (lambda folder: (folder / "parallelmind.json").write_text("[]"), "is damaged"),
        (edit(format_version=1), "format_version=1, but this version reads 2"),
        (edit(surprise=1), r"is damaged \(surprise.*\); save the folder again"),
        (edit(lora={"lora_rank": "4"}), r"lora\.lora_rank"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            r"adapter_model\.safetensors is missing, not",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            r"adapter_config\.json is 44136fa355b3, not",
        ),
    ],
)
def test_a_damaged_adapter_is_refused(saved: Path, tmp_path: Path, damage: Damage, message: str) -> None:
    folder = tmp_path / "adapter {0}"  # braces are part of some names
    shutil.copytree(saved, folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load_model_with_lora(lora_path=folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pickled_adapter_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle") as error:
        load_model_with_lora(lora_path=folder)
    assert "\n" not in str(error.value)


def card(base_model: str, folder: Path, rope: RopeConfig = ROPE, **extra: Any) -> tuple[dict[str, Any], str]:
    save_adapter(
        trained(patched_llama(ROPE)),
        tiny_tokenizer(),
        folder,
        ModelConfig(base_model=base_model),
        rope,
        LORA,
        extra,
    )
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_describes_the_adapter_and_its_loading(tmp_path: Path) -> None:
    front, text = card(
        "org/name", tmp_path / "adapter", metrics={"validation/loss_4": 1.23456, "step": 7}, run="demo-1234"
    )
    assert (front["base_model"], front["library_name"], front["pipeline_tag"]) == (
        "org/name",
        "peft",
        "text-generation",
    )
    assert {"lora", "parallelmind"} <= set(front["tags"])
    assert 'pm.load_model_with_lora(base_model="org/name", lora_path=' in text
    for row in (
        "rope_2d_ratio | 0.5",
        "visibility | isolated",
        "lora_rank | 4",
        "validation/loss_4 | 1.235",
        "step | 7",
    ):
        assert f"| {row} |" in text
    assert f"| torch | {torch.__version__} |" in text
    assert "several branches" in text


def test_the_card_has_no_path_and_no_empty_metrics(base_folder: str, tmp_path: Path) -> None:
    front, text = card(base_folder, tmp_path / "adapter", ROPE.model_copy(update={"patch_rope": False}))
    assert front["base_model"] == Path(base_folder).name
    assert str(Path(base_folder).parent) not in text
    assert "Metrics" not in text
    assert "plain sequences" in text


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop(NAME), r"q_proj.*\(missing in the files, \[4, 64\] in the model\)"),
        (
            lambda weights: weights.update({"a.b": torch.zeros(2)}),
            r"a\.b \(\[2\] in the files, missing",
        ),
        (
            lambda weights: weights.update({NAME: torch.zeros(3, 64)}),
            r"\(\[3, 64\] in the files, \[4, 64\]",
        ),
        (None, r"adapter_model\.safetensors is damaged \(.*\); copy the folder again"),
    ],
)
def test_unfit_weights_are_refused_also_where_no_checksum_tells(
    saved: Path, tmp_path: Path, change: Callable[[Any], object] | None, message: str
) -> None:
    shutil.copytree(saved, folder := tmp_path / "adapter")
    edit(files={})(folder)
    file = folder / "adapter_model.safetensors"
    if change is None:
        file.write_bytes(file.read_bytes()[:-8])
    else:
        change(weights := load_file(file))
        save_file(weights, file)
    with pytest.raises(UserError, match=f"lora_path=.*{message}") as error:
        load_model_with_lora(lora_path=folder)
    assert "\n" not in str(error.value)


def config_text(text: str) -> Damage:
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def settings(**fields: Any) -> Damage:
    """Edit adapter_config.json."""

    def change(folder: Path) -> None:
        edit(files={})(folder)
        values = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**values, **fields}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config_text("{"), r"is damaged \(Expecting property"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            r"is damaged \(peft_type=null is not LORA\)",
        ),
        (config_text("[]"), r"is damaged \(.*\); copy the"),
        (lambda folder: (folder / "adapter_config.json").unlink(), r"is damaged \(.*No such file"),
        (settings(peft_type="LATER"), r"is damaged \(peft_type=LATER is not LORA\); copy the folder again"),
        (settings(r=0), r"`r` should be a positive integer.*; load the base"),
        (settings(r=8), r"\(\[4, 128\] in the files, \[8, 128\] in the model\); load the base"),
        (
            settings(target_modules=["absent"]),
            r"Target modules .* not found.*; load the base",
        ),
    ],
)
def test_unfit_settings_are_refused_also_where_no_checksum_tells(
    saved: Path, tmp_path: Path, change: Damage, message: str
) -> None:
    shutil.copytree(saved, folder := tmp_path / "adapter")
    edit(files={})(folder)
    change(folder)
    with pytest.raises(UserError, match=f"lora_path=.*{message}") as error:
        load_model_with_lora(lora_path=folder)
    assert "\n" not in str(error.value)


def test_settings_of_a_later_peft_are_told_if_they_are_not_off(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, folder := tmp_path / "adapter")
    settings(later_off=None, later_size=16)(folder)
    with pytest.warns(
        UserNotice, match=r"lora_path=.*: later_size of adapter_config\.json is without"
    ) as told:
        load_model_with_lora(lora_path=folder)
    assert len(told) == 1


def test_another_architecture_is_refused(saved: Path) -> None:
    with pytest.raises(UserError, match="architecture .* is not that of the adapter's base"):
        load_adapter(
            patched_llama(ROPE, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
            tiny_tokenizer(),
            saved,
        )


def test_another_chat_template_is_refused(saved: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="chat template \\(none\\) is not that of the adapter's base"):
        load_adapter(patched_llama(ROPE), tokenizer, saved)


def test_other_weights_are_refused(saved: Path, tmp_path: Path) -> None:
    message = (
        r"base_model=.*: its weight model.* \(.*\) is not that of the adapter's base \(.*\); give base_m"
    )
    with pytest.raises(UserError, match=message) as error:
        load_model_with_lora(save_tiny(tmp_path, seed=1), saved)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is not that of the adapter's base"):
        resume_adapter(patched_llama(ROPE, seed=1), tiny_tokenizer(), saved, LORA)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_was_trained_a_little_further_is_refused(saved: Path, tmp_path: Path, dtype: str) -> None:
    """One kind of weights of one layer has changed, by less than bfloat16 tells of most values."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1.004)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    message = "its weight model.layers.1.self_attn.v_proj.weight .* is not that of the adapter's base"
    with pytest.raises(UserError, match=message):
        load_model_with_lora(tmp_path / "base", saved, dtype=dtype)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_act": "gelu"}, r"hidden_act \(gelu\) is not that of the adapter's base \(silu\)"),
        ({"rms_norm_eps": 0.1}, r"rms_norm_eps \(0.1\)"),
    ],
)
def test_a_base_that_computes_otherwise_is_refused(saved: Path, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=rf"^base_model.*: its {part}.*; give base_model=/") as error:
        load_adapter(patched_llama(ROPE, **changes), tiny_tokenizer(), saved)
    assert "\n" not in str(error.value)


def test_other_types_of_layers_are_told_by_the_first_one() -> None:
    full, mixed = (
        BaseIdentity(
            eos_token_id=2,
            tie_word_embeddings=False,
            dtype="float32",
            computation={"layer_types": types, "sliding_window": None},
            weights={},
        )
        for types in (["full_attention"] * 3, ["full_attention", "sliding_attention", "full_attention"])
    )
    expected = ("layer_types[1]", "full_attention", "sliding_attention")
    assert full.differences(mixed) == [expected]
    assert full.differences(full.model_copy(update={"computation": {}})) == []


def test_the_fingerprint_does_not_depend_on_how_the_weights_are_divided_into_files(
    saved: Path, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    load_model_with_lora(tmp_path / "base", saved)


def test_an_adapter_of_an_earlier_version_is_loaded_with_a_notice(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, folder := tmp_path / "adapter")
    manifest = json.loads((folder / "parallelmind.json").read_text())
    del manifest["base"]["computation"]
    kept = ("model.embed_tokens.weight", "lm_head.weight")
    manifest["base"]["weights"] = {name: manifest["base"]["weights"][name] for name in kept}
    (folder / "parallelmind.json").write_text(json.dumps(manifest))
    with pytest.warns(UserNotice, match="an earlier version saved this adapter and recorded less about"):
        load_model_with_lora(lora_path=folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_adapter_that_is_not_finite_is_refused_by_the_name_of_its_tensor(
    saved: Path, tmp_path: Path, value: float
) -> None:
    shutil.copytree(saved, folder := tmp_path / "adapter")
    weights = load_file(folder / "adapter_model.safetensors")
    name = sorted(weights)[3]
    weights[name][0, 0] = value
    save_file(weights, folder / "adapter_model.safetensors")
    manifest = json.loads((folder / "parallelmind.json").read_text())
    manifest["files"]["adapter_model.safetensors"] = sha256(folder / "adapter_model.safetensors")
    (folder / "parallelmind.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"^lora_path=.*: {name} of adapter_model.safetensors holds NaN or"):
        load_model_with_lora(lora_path=folder)


def test_peft_finds_the_base_of_an_adapter_and_computes_a_lone_branch_alike(
    saved: Path, base_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the base was given as a relative path, and another folder is the current one."""
    monkeypatch.chdir(Path(base_folder).parent)
    base = ModelConfig(base_model=Path(base_folder).name)
    save_adapter(trained(patched_llama(ROPE)), tiny_tokenizer(), tmp_path / "adapter", base, ROPE, LORA)
    ours, _ = load_model_with_lora(lora_path=tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits, ours(input_ids=ids).logits)


@pytest.mark.parametrize("trained_in", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("loaded_in", ["float32", "bfloat16", "float16"])
def test_the_same_weights_in_another_dtype_are_accepted(
    base_folder: str, tmp_path: Path, trained_in: str, loaded_in: str
) -> None:
    base = ModelConfig(base_model=base_folder, dtype=trained_in)
    model, tokenizer = load_model_with_lora(base_folder, dtype=trained_in, **ROPE.model_dump())
    save_adapter(trained(model), tokenizer, tmp_path / "adapter", base, ROPE, LORA)
    load_model_with_lora(lora_path=tmp_path / "adapter", dtype=loaded_in)


def test_an_adapter_of_split_weights_and_a_second_one_fit_their_base(
    base_folder: str, tmp_path: Path
) -> None:
    config = LORA.model_copy(update={"lora_init": "pissa"})
    model, tokenizer = load_model_with_lora(base_folder, **ROPE.model_dump())
    base = ModelConfig(base_model=base_folder)
    save_adapter(trained(model, config), tokenizer, tmp_path / "adapter", base, ROPE, config)
    loaded, _ = load_model_with_lora(lora_path=tmp_path / "adapter")
    second = read_saved(loaded, tokenizer, tmp_path / "adapter")
    assert set(attach(loaded, second, "second").peft_config) == {"default", "second"}


def test_another_end_token_is_refused(saved: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<s>"
    with pytest.raises(UserError, match=r"its end token \(1\) is not that of the adapter's base \(2\)"):
        load_adapter(patched_llama(ROPE), tokenizer, saved)


def test_a_base_with_tied_embeddings_is_refused_where_they_were_not(saved: Path) -> None:
    with pytest.raises(UserError, match=r"its tie_word_embeddings \(True\) is not that of .* \(False\)"):
        load_adapter(patched_llama(ROPE, tie_word_embeddings=True), tiny_tokenizer(), saved)


def test_an_adapter_without_a_record_of_its_base_loads(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(saved, folder)
    values = json.loads((folder / "parallelmind.json").read_text())
    del values["base"]
    (folder / "parallelmind.json").write_text(json.dumps(values))
    with pytest.warns(UserNotice, match="so another base may not be noticed; save it anew"):
        load_adapter(patched_llama(ROPE, seed=1), tiny_tokenizer(), folder)


def test_another_patch_is_refused(saved: Path) -> None:
    model = tiny_llama()
    with pytest.raises(UserError, match="patch_rope=false: the adapter has patch_rope=true"):
        load_adapter(model, tiny_tokenizer(), saved)
    patch(model, ROPE.model_copy(update={"rope_2d_ratio": 0.25}))
    with pytest.raises(UserError, match=r"rope_2d_ratio=0\.25: the adapter has rope_2d_ratio=0\.5"):
        load_adapter(model, tiny_tokenizer(), saved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rope_2d_ratio": 0.25}, "rope_2d_ratio=0.25: the adapter has rope_2d_ratio=0.5"),
        ({"lora_rank": 8}, "lora_rank=8: the adapter has lora_rank=4"),
        ({"positions": "flat"}, "positions=flat: the adapter has positions=time"),
        ({"visibility": "columnar"}, "visibility=columnar: the adapter has visibility=isolated"),
        ({"rope_ratio": 0.5}, "rope_ratio: unknown field"),
        ({"dtype": "int8"}, "dtype=int8"),
    ],
)
def test_a_setting_that_differs_from_the_adapter_is_refused(
    saved: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        load_model_with_lora(lora_path=saved, **settings)
    assert str(error.value).startswith(message)


def test_settings_that_match_the_adapter_are_accepted(saved: Path, base_folder: str) -> None:
    model, _ = load_model_with_lora(
        base_folder, saved, 4, rope_2d_ratio=0.5, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert rope_config(model) == ROPE
    assert not model.training
    assert model.dtype == torch.bfloat16


def test_without_an_adapter_the_base_is_patched(base_folder: str) -> None:
    model, _ = load_model_with_lora(base_folder, rope_2d_ratio=0.25, positions="flat")
    assert not isinstance(model, PeftModel)
    assert rope_config(model) == RopeConfig(rope_2d_ratio=0.25, positions="flat")
    with pytest.raises(UserError, match="lora_rank=4: needs lora_path"):
        load_model_with_lora(base_folder, lora_rank=4)


def test_the_config_hash_depends_on_the_architecture_only() -> None:
    expected = base_config_hash(config := tiny_llama().config)
    config._name_or_path, config.transformers_version, config.use_cache = "elsewhere", "6", False
    config.rope_parameters = {"rope_theta": 10000, "rope_type": "default"}
    assert base_config_hash(config) == expected
    config.num_key_value_heads = 4
    assert base_config_hash(config) != expected
