"""What the process in front asks for before it serves, and what it counts."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest
from asgi import TOLD, Reply, ask, counted, front, post

from parallelmind import cli
from parallelmind.engine.output import Event
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.errors import UserError
from serving.__main__ import main
from serving.engine.messages import BranchStarted, StepOutput

VARIABLE = "PARALLELMIND_API_KEYS"


@pytest.mark.parametrize("text", ["", " \n\n"])
def test_a_file_of_keys_without_a_key_does_not_let_everybody_in(tmp_path: Path, text: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text(text)
    with pytest.raises(
        UserError, match=r"api_keys_file=.*keys: holds no key; add one, or leave it out"
    ) as error:
        front(tmp_path, api_keys_file=str(keys)).__serve_build_asgi_app__()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", " ,\n"])
def test_a_variable_without_a_key_does_not_let_everybody_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(
        UserError, match=re.escape(f"${VARIABLE}={text!r}: holds no key; add one, or unset it")
    ):
        front(tmp_path).__serve_build_asgi_app__()


def test_the_command_line_says_so_before_it_starts_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("serving.__main__._start", lambda _: pytest.fail("it starts"))
    monkeypatch.setattr("serving.__main__._require_free", lambda _: None)
    monkeypatch.setattr("sys.argv", ["serving", "base_model=tiny"])
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert (end.value.code, capsys.readouterr().err.count("\n")) == (2, 1)


def test_keys_of_file_and_variable_are_all_known_and_where_neither_is_given_all_are_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def status(key: str, **settings: str) -> int | None:
        app = front(tmp_path, TOLD, **settings).__serve_build_asgi_app__()
        return asyncio.run(ask(app, headers={"authorization": f"Bearer {key}"})).status

    keys = tmp_path / "keys"
    keys.write_text("one\n\n two \n")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert status("whatever") == 200
    assert [status(key, api_keys_file=str(keys)) for key in ("one", "two", "three")] == [200, 200, 401]
    monkeypatch.setenv(VARIABLE, "")
    assert [status(key, api_keys_file=str(keys)) for key in ("one", "")] == [200, 401]
    monkeypatch.setenv(VARIABLE, "three, four")
    assert [status(key, api_keys_file=str(keys)) for key in ("one", "four", "five")] == [200, 200, 401]


def test_the_rules_are_the_same_below_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "one")
    served = front(tmp_path, TOLD)
    app, known = (
        served.__serve_build_asgi_app__(),
        {"authorization": "Bearer one", "content-type": "application/json"},
    )

    def asked(
        path: str, method: str = "GET", headers: dict[str, str] | None = None, body: bytes = b""
    ) -> Reply:
        return asyncio.run(ask(app, method, path, headers, [body], prefix="/mind"))

    work = asked("/v1/completions", "POST", known, b'{"model": "tiny", "prompt": "who"}')
    assert (work.status, asked("/health").status, asked("/mind/health").status) == (
        200,
        503,
        401,
    )  # no engine here is well
    assert [asked(path).headers["www-authenticate"][:5] for path in ("/", "/v1/models")] == ["Basic", "Beare"]
    for route, status in (("/v1/completions", "200"), ("/health", "503")):
        assert counted(served.meters, "requests_total", route=route, status=status) == 1


def test_prompt_tokens_are_counted_as_usage_tells_them(tmp_path: Path) -> None:
    told = [
        StepOutput([], [BranchStarted(0, [7], SamplingParams(), (1, 2))]),
        StepOutput([Event(0, "A", 65, "stop", pos2d=(1, 3))], []),
        StepOutput(
            [Event(1, "B", 66, "stop", pos2d=(2, 7))], []
        ),  # the branch that reads all others begins by its first token
    ]
    served = front(tmp_path, told)
    body = {"model": "tiny", "main": [5, 6], "branches": [{"text": [7]}], "reduce": [8, 9, 10]}
    reply = asyncio.run(post(served.__serve_build_asgi_app__(), "/v1/branches", body))
    assert json.loads(reply.body)["usage"]["prompt_tokens"] == 6
    assert counted(served.meters, "tokens_total", kind="prompt") == 6
