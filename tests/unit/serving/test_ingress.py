"""The ingress: API keys that are read before it serves, its routes below a prefix, and what it counts."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from asgi import (
    ONE_TOKEN_STEPS,
    Reply,
    ingress_app,
    make_ingress,
    metric_value,
    post_json,
    send_request,
)

from parallelmind import cli
from parallelmind.engine.output import Event
from parallelmind.errors import UserError
from serving.__main__ import main
from serving.engine.messages import BranchStarted, StepOutput

ENV_VARIABLE = "PARALLELMIND_API_KEYS"


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_a_key_file_without_a_key_is_refused(tmp_path: Path, text: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text(text)
    with pytest.raises(
        UserError, match=r"api_keys_file=.*keys: holds no key; add one, or leave it out"
    ) as error:
        ingress_app(tmp_path, api_keys_file=str(keys))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", " ,\n"])
def test_a_key_variable_without_a_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(ENV_VARIABLE, text)
    message = f"${ENV_VARIABLE}={text!r}: holds no key; add one, or unset it"
    with pytest.raises(UserError, match=re.escape(message)):
        ingress_app(tmp_path)


def test_the_command_line_refuses_keys_before_it_starts_ray(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("serving.__main__._start", lambda _: pytest.fail("Ray is started"))
    monkeypatch.setattr("serving.__main__._require_free_port", lambda _: None)
    monkeypatch.setattr("sys.argv", ["serving", "base_model=tiny"])
    monkeypatch.setenv(ENV_VARIABLE, "")
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert (end.value.code, capsys.readouterr().err.count("\n")) == (2, 1)


def test_keys_of_file_and_variable_are_valid_and_without_any_no_key_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def status(key: str, **settings: str) -> int | None:
        app = ingress_app(tmp_path, ONE_TOKEN_STEPS, **settings)
        return asyncio.run(send_request(app, headers={"authorization": f"Bearer {key}"})).status

    keys = tmp_path / "keys"
    keys.write_text("one\n\n two \n")
    monkeypatch.delenv(ENV_VARIABLE, raising=False)
    assert status("whatever") == 200
    assert [status(key, api_keys_file=str(keys)) for key in ("one", "two", "three")] == [200, 200, 401]
    monkeypatch.setenv(ENV_VARIABLE, "")
    assert [status(key, api_keys_file=str(keys)) for key in ("one", "")] == [200, 401]
    monkeypatch.setenv(ENV_VARIABLE, "three, four")
    assert [status(key, api_keys_file=str(keys)) for key in ("one", "four", "five")] == [200, 200, 401]


def test_limits_and_metrics_are_the_same_below_a_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_VARIABLE, "one")
    ingress = make_ingress(tmp_path, ONE_TOKEN_STEPS)
    app = ingress.__serve_build_asgi_app__()
    headers = {"authorization": "Bearer one", "content-type": "application/json"}

    def send(
        path: str, method: str = "GET", headers: dict[str, str] | None = None, body: bytes = b""
    ) -> Reply:
        return asyncio.run(send_request(app, method, path, headers, [body], prefix="/mind"))

    completion = send("/v1/completions", "POST", headers, b'{"model": "tiny", "prompt": "who"}')
    assert completion.status == 200
    assert send("/health").status == 503  # the stub engine is not healthy
    assert send("/mind/health").status == 401
    challenges = [send(path).headers["www-authenticate"][:5] for path in ("/", "/v1/models")]
    assert challenges == ["Basic", "Beare"]
    for route, status in (("/v1/completions", "200"), ("/health", "503")):
        assert metric_value(ingress.metrics, "requests_total", route=route, status=status) == 1


def test_prompt_tokens_in_metrics_are_those_of_the_usage(tmp_path: Path) -> None:
    steps = [
        StepOutput([], [BranchStarted(0, (1, 2))]),
        StepOutput([Event(0, "A", 65, "stop", pos2d=(1, 3))]),
        StepOutput([Event(1, "B", 66, "stop", pos2d=(2, 7))]),  # the reduce branch
    ]
    ingress = make_ingress(tmp_path, steps)
    body = {"model": "tiny", "main": [5, 6], "branches": [{"text": [7]}], "reduce": [8, 9, 10]}
    reply = asyncio.run(post_json(ingress.__serve_build_asgi_app__(), "/v1/branches", body))
    assert json.loads(reply.body)["usage"]["prompt_tokens"] == 6
    assert metric_value(ingress.metrics, "tokens_total", kind="prompt") == 6


@pytest.mark.parametrize("path", ["/v1/models/", "/health/", "/web"])
def test_no_path_redirects_to_the_host_that_a_client_names(tmp_path: Path, path: str) -> None:
    reply = asyncio.run(send_request(ingress_app(tmp_path), path=path, headers={"host": "localhost"}))
    assert reply.status == 404
    assert "location" not in reply.headers


def test_the_names_of_hosts_are_configured(tmp_path: Path) -> None:
    app = ingress_app(tmp_path, allowed_hosts="[mind.example.com]")
    statuses = [
        asyncio.run(send_request(app, headers={"host": host})).status
        for host in ("mind.example.com", "rebound.example")
    ]
    assert statuses == [200, 421]


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "mind.example.com"])
def test_the_command_line_refuses_other_machines_without_keys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    monkeypatch.setattr("serving.__main__._start", lambda _: pytest.fail("Ray is started"))
    monkeypatch.setattr("sys.argv", ["serving", "base_model=tiny", f"host={host}"])
    monkeypatch.delenv(ENV_VARIABLE, raising=False)
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    error = capsys.readouterr().err
    assert (end.value.code, error.count("\n")) == (2, 1)
    assert f"host={host}: other machines reach it" in error
