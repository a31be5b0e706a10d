"""Log lines name their request, and hold nothing that a client has entrusted to the server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
from asgi import ONE_TOKEN_STEPS, ingress_app, send_request

from serving.observability.log import configure_log, log

BODY = b'{"model": "tiny", "prompt": "a quiet word"}'


@pytest.fixture
def log_lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[str]]]:
    before, stderr = (log.handlers[:], log.propagate, log.level), StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    configure_log("info")
    yield lambda: stderr.getvalue().splitlines()
    log.handlers[:], log.propagate, level = before
    log.setLevel(level)


def complete(folder: Path, key: str, log_prompts: bool) -> int | None:
    """The status of a completion request with the id ticket-7."""
    app = ingress_app(folder, ONE_TOKEN_STEPS, log_level="info", log_prompts=log_prompts)
    headers = {
        "content-type": "application/json",
        "authorization": f"Bearer {key}",
        "x-request-id": "ticket-7",
    }
    return asyncio.run(send_request(app, "POST", "/v1/completions", headers, [BODY])).status


@pytest.mark.parametrize(("key", "status"), [("open-sesame", 200), ("close-sesame", 401)])
@pytest.mark.parametrize("log_prompts", [False, True])
def test_lines_hold_the_request_id_no_key_and_the_prompt_only_if_configured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_lines: Callable[[], list[str]],
    key: str,
    status: int,
    log_prompts: bool,
) -> None:
    monkeypatch.setenv("PARALLELMIND_API_KEYS", "open-sesame")
    assert complete(tmp_path, key, log_prompts) == status
    lines = log_lines()
    assert all(" ticket-7 " in line for line in lines)
    assert not any("sesame" in line for line in lines)
    assert sum("a quiet word" in line for line in lines) == (log_prompts and status == 200)
    assert sum("POST /v1/completions 200" in line for line in lines) == (status == 200)


def test_a_path_cannot_forge_a_log_line(tmp_path: Path, log_lines: Callable[[], list[str]]) -> None:
    app = ingress_app(tmp_path, log_level="info")
    forged = "/x\n2026-01-01 00:00:00,000 INFO admin GET /v1/models 200"
    asyncio.run(send_request(app, "GET", forged, {"x-request-id": "ticket-7"}))
    (line,) = log_lines()
    assert " ticket-7 GET /x%0A2026-01-01%20" in line


def test_a_malformed_request_id_is_replaced_without_a_log_line_of_its_own(
    tmp_path: Path, log_lines: Callable[[], list[str]]
) -> None:
    app = ingress_app(tmp_path, log_level="info")
    asyncio.run(send_request(app, "GET", "/v1/models", {"x-request-id": "a\nforged line"}))
    (line,) = log_lines()
    assert "forged" not in line
