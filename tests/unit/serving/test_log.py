"""The log tells which request a line is about, and nothing that a client has entrusted to the server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from asgi import TOLD, ask, front

from serving.observability.log import log, set_up

BODY = b'{"model": "tiny", "prompt": "a quiet word"}'


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    before, told = (log.handlers[:], log.propagate, log.level), StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    set_up("info")
    yield lambda: told.getvalue().splitlines()
    log.handlers[:], log.propagate, level = before
    log.setLevel(level)


def asked(folder: Path, key: str, log_prompts: bool) -> int | None:
    app = front(folder, TOLD, log_level="info", log_prompts=log_prompts).__serve_build_asgi_app__()
    headers = {
        "content-type": "application/json",
        "authorization": f"Bearer {key}",
        "x-request-id": "ticket-7",
    }
    return asyncio.run(ask(app, "POST", "/v1/completions", headers, [BODY])).status


@pytest.mark.parametrize(("key", "status"), [("open-sesame", 200), ("close-sesame", 401)])
@pytest.mark.parametrize("log_prompts", [False, True])
def test_a_line_names_its_request_and_no_key_and_a_prompt_only_if_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: Callable[[], list[str]],
    key: str,
    status: int,
    log_prompts: bool,
) -> None:
    monkeypatch.setenv("PARALLELMIND_API_KEYS", "open-sesame")
    assert asked(tmp_path, key, log_prompts) == status
    told = lines()
    assert all(" ticket-7 " in line for line in told)
    assert not any("sesame" in line for line in told)
    assert sum("a quiet word" in line for line in told) == (log_prompts and status == 200)
    assert sum("POST /v1/completions 200" in line for line in told) == (status == 200)


def test_a_path_writes_no_line_of_its_own(tmp_path: Path, lines: Callable[[], list[str]]) -> None:
    app = front(tmp_path, log_level="info").__serve_build_asgi_app__()
    forged = "/x\n2026-01-01 00:00:00,000 INFO admin GET /v1/models 200"
    asyncio.run(ask(app, "GET", forged, {"x-request-id": "ticket-7"}))
    (line,) = lines()
    assert " ticket-7 GET /x%0A2026-01-01%20" in line
