"""Uploads to the hub: every byte of a folder, early refusals, and the messages of failures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, fake_hub
from huggingface_hub import constants

from parallelmind.config import LoraConfig, ModelConfig, RopeConfig, TrainConfig
from parallelmind.errors import UserError, UserNotice
from parallelmind.model import hub as hub_module
from parallelmind.model.card import write_card
from parallelmind.model.manifest import FORMAT, Manifest, save_manifest
from parallelmind.model.push import check_push, push
from parallelmind.storage import sha256
from workloads.__main__ import run_command
from workloads.train.data_files import DataFiles
from workloads.train.preflight import check_run
from workloads.train.run import run_training
from workloads.train.run_dir import RunDir


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter in the folder of its run, with a file that is none of its own."""
    folder = tmp_path_factory.mktemp("runs") / "mine-hash" / "adapter"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 1000)
    manifest = Manifest(
        format_version=FORMAT,
        base_model="org/name",
        base_config_sha256="",
        chat_template_sha256=None,
        rope=RopeConfig(),
        lora=LoraConfig(),
        versions={},
        files={path.name: sha256(path) for path in folder.iterdir()},
        extra={},
    )
    save_manifest(folder, manifest)
    write_card(folder, manifest, ModelConfig(base_model="org/name"))
    (folder / "notes.txt").write_text("not a part of the adapter")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub of this process, with a token that may write."""
    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
        monkeypatch.setenv("HF_TOKEN", next(iter(hub.tokens)))
        hub_module._hub_problem.cache_clear()
        yield hub
    hub_module._hub_problem.cache_clear()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "notes.txt"}


def test_every_byte_of_the_adapter_is_in_one_commit(hub: FakeHub, adapter: Path) -> None:
    url = push(adapter, "me/mine")
    assert url == f"{hub.url}/me/mine"
    assert hub.repos == {"me/mine": contents(adapter)}
    assert {"adapter_model.safetensors", "parallelmind.json", "README.md"} <= hub.repos["me/mine"].keys()
    assert hub.commits == ["Upload adapter with parallelmind"]
    assert hub.private == {"me/mine": False}
    push(adapter, "me/mine")
    assert len(hub.commits) == 1  # nothing has changed


def test_the_command_takes_a_run_folder(
    hub: FakeHub, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_command(["push", f"folder={adapter.parent}", "push_to=me/mine", "push_private=true"])
    assert hub.repos == {"me/mine": contents(adapter)}
    assert hub.private == {"me/mine": True}
    assert capsys.readouterr().out.splitlines()[-1] == f"hub      {hub.url}/me/mine"


def test_a_failed_upload_is_one_line_with_the_command_that_repeats_it(hub: FakeHub, adapter: Path) -> None:
    hub.refuses = True
    with pytest.raises(UserError, match=r"^push_to=me/mine: the upload failed \(") as error:
        push(adapter, "me/mine")
    command = f"python -m workloads.push folder={adapter} push_to=me/mine repeats the upload"
    assert str(error.value).endswith(f"{adapter} is complete, and {command}")
    assert "\n" not in str(error.value)
    hub.refuses = False
    run_command(["push", f"folder={adapter}", "push_to=me/mine"])
    assert hub.repos == {"me/mine": contents(adapter)}


def finished_run(folder: Path, adapter: Path) -> TrainConfig:
    """A run whose result is this adapter."""
    (folder / "data.jsonl").write_text('{"text": "one"}\n')
    config = TrainConfig(
        data_path=str(folder / "data.jsonl"),
        output_dir=str(folder / "runs"),
        dtype="float32",
        push_to="me/mine",
    )
    run_folder = RunDir.of(config).path.local
    run_folder.mkdir(parents=True)
    (run_folder / "adapter").symlink_to(adapter)
    return config


def test_a_finished_run_is_uploaded_by_the_same_command(hub: FakeHub, adapter: Path, tmp_path: Path) -> None:
    config = finished_run(tmp_path, adapter)
    assert RunDir.of(config) == RunDir.of(config.replace(push_to=None, push_private=True))
    run_training(config)
    assert hub.repos == {"me/mine": contents(adapter)}


@pytest.mark.parametrize(
    ("token", "role", "message"),
    [
        (None, None, r"push_to=me/mine: there is no token of the hub; run hf auth login, or set HF_TOKEN$"),
        (
            "hf_unknown_0123456789",
            None,
            r"push_to=me/mine: the hub does not take the token \(401\); give one",
        ),
        ("hf_read_0123456789", "read", r"push_to=me/mine: the token of me may only read; give one"),
    ],
)
def test_a_run_whose_upload_would_fail_is_refused(
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    adapter: Path,
    tmp_path: Path,
    token: str | None,
    role: str | None,
    message: str,
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    if token and role:
        hub.tokens[token] = role
    config = finished_run(tmp_path, adapter)
    with pytest.raises(UserError, match=message) as error:
        check_run(config, DataFiles.find(config.data))
    assert "\n" not in str(error.value)
    assert not hub.repos


def test_a_hub_that_is_not_there_is_told_at_once(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"push_to=me/mine: the hub cannot be reached \(http://127.0.0.1:9: "):
        check_push("me/mine")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "name", ["mine", "me/", "me/mi ne", "me/a--b", "a/b/c", "me/-a", "me/a.git", "hf://me/a"]
)
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a repository on the hub; give USER/NAME"):
        TrainConfig(data_path="data.jsonl", push_to=name)


@pytest.mark.parametrize(
    ("base", "note"),
    [
        ("smollm2-135m", "load_model_with_lora finds smollm2-135m by itself, peft does not"),
        ("/models/mine", "others need a base_model of their own"),
    ],
)
def test_a_base_that_only_this_machine_has_is_told(
    hub: FakeHub, adapter: Path, tmp_path: Path, base: str, note: str
) -> None:
    copy = tmp_path / "adapter"
    copy.mkdir()
    for name, content in contents(adapter).items():
        (copy / name).write_bytes(content)
    manifest = json.loads((copy / "parallelmind.json").read_text())
    (copy / "parallelmind.json").write_text(json.dumps({**manifest, "base_model": base}))
    with pytest.warns(UserNotice, match=f"names the base model by its folder on this machine; {note}"):
        push(copy, "me/mine")
    assert hub.repos == {"me/mine": contents(copy)}


def test_a_changed_file_is_not_uploaded(hub: FakeHub, adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "adapter"
    copy.mkdir()
    for name, content in contents(adapter).items():
        (copy / name).write_bytes(content)
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**settings, "r": 1}))
    with pytest.raises(UserError, match=r"^folder=.*adapter_config.json is .*, not .* as saved"):
        push(copy, "me/mine")
    assert not hub.repos
