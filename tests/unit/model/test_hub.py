"""Models of the hub: from the cache while the hub does not answer, and one line where there is none."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from tiny import save_tiny, tiny_tokenizer

from parallelmind.config import ModelConfig
from parallelmind.errors import UserError, UserNotice
from parallelmind.model import hub
from parallelmind.model.base_model import load_base, load_base_config, load_tokenizer

ROOT = Path(__file__).resolve().parents[3]
NAME = "org/tiny"
MODEL = ModelConfig(base_model=NAME)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HF_HOME whose cache holds `NAME`."""
    home = tmp_path_factory.mktemp("home")
    model = home / "hub" / "models--org--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    save_tiny(model / "snapshots" / ("0" * 40))
    return home


@pytest.fixture
def cached(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cache of this process is that of `home`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    hub._hub_problem.cache_clear()
    yield
    hub._hub_problem.cache_clear()


@pytest.fixture(scope="module")
def black_hole() -> Iterator[str]:
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(params=["refused", "silent"])
def endpoint(request: pytest.FixtureRequest, black_hole: str, monkeypatch: pytest.MonkeyPatch) -> str:
    address = black_hole if request.param == "silent" else "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    return address


def test_a_cached_model_loads_while_the_hub_does_not_answer(cached: None, endpoint: str) -> None:
    start = time.monotonic()
    with pytest.warns(UserNotice, match=f"base_model={NAME}: read from the cache, since .*{endpoint}"):
        model, tokenizer = load_base(MODEL)
    with pytest.warns(UserNotice):
        assert load_base_config(MODEL).hidden_size == 64
    assert time.monotonic() - start < 5
    assert model.config._name_or_path == model.name_or_path == NAME
    assert len(tokenizer) == len(tiny_tokenizer())


def test_a_model_that_is_not_cached_is_one_line(cached: None, endpoint: str) -> None:
    start = time.monotonic()
    message = (
        f"base_model=org/other: is not in .*cache.*, and the hub cannot be reached .*{endpoint}.*; connect"
    )
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(ModelConfig(base_model="org/other"))
    assert time.monotonic() - start < 5
    assert "\n" not in str(error.value)


def test_weights_that_are_not_cached_are_one_line(
    cached: None, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(home / "hub", tmp_path / "hub")
    next(tmp_path.rglob("model.safetensors")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with (
        pytest.warns(UserNotice, match="HF_HUB_OFFLINE is set"),
        pytest.raises(UserError, match=f"base_model={NAME}: cannot be loaded .*model.safetensors") as error,
    ):
        load_base(MODEL)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("status", "is_used"), [(200, True), (404, True), (503, False)])
def test_a_hub_that_answers_is_used(
    cached: None, monkeypatch: pytest.MonkeyPatch, status: int, is_used: bool
) -> None:
    class Session:
        def head(self, url: str, timeout: float) -> Session:
            self.status_code = status
            return self

    monkeypatch.setattr(hub, "get_session", Session)
    if is_used:
        assert hub.find_hub_model(NAME) == NAME
    else:
        with pytest.warns(UserNotice, match="answers 503"):
            assert Path(hub.find_hub_model(NAME)).name == "0" * 40


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAME, "org/other"])
def test_a_command_uses_the_cache_or_tells(home: Path, black_hole: str, name: str) -> None:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]),
        "HF_HOME": str(home),
        "HF_ENDPOINT": black_hole,
    }
    command = [
        sys.executable,
        "-m",
        "workloads.generate",
        f"base_model={name}",
        "prompt=who",
        "max_new_tokens=2",
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode == 0) == (name == NAME)
    first, *rest = done.stderr.splitlines()
    assert first.startswith("note: " if name == NAME else "error: base_model=org/other: is not in ")
    assert len(rest) == (name == NAME), done.stderr  # the number of samples
