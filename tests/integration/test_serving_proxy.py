"""`proxy=serve`: the server behind Serve's own proxy, without HAProxy and without patches of Ray Serve."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from servers import Server, save_talker, serving

pytestmark = pytest.mark.slow
BODY: dict[str, Any] = {"model": "talker", "prompt": ["who", "what is"], "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("proxy")
    with serving(folder / "server", base_model=save_talker(folder / "talker"), proxy="serve") as started:
        yield started


def test_requests_and_streams_are_answered(server: Server) -> None:
    status, body = server.post("/v1/completions", BODY)
    assert status == 200
    texts = ["", ""]
    *chunks, end = server.stream("/v1/completions", BODY)
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["text"]
    assert end == "[DONE]"
    assert texts == [choice["text"] for choice in body["choices"]]


def test_errors_keep_openais_format(server: Server) -> None:
    status, body = server.post("/v1/completions", {**BODY, "temperature": -1})
    assert (status, body["error"]["param"]) == (400, "temperature")


def test_a_client_that_leaves_frees_the_engine(server: Server) -> None:
    leaver = server.connect("POST", "/v1/completions", {**BODY, "max_tokens": 1000, "stream": True})
    deadline = time.monotonic() + 20
    while not server.metric("live_branches"):
        assert time.monotonic() < deadline
    leaver.close()
    deadline = time.monotonic() + 5
    while server.metric("live_branches"):
        assert time.monotonic() < deadline


def test_no_haproxy_runs(server: Server) -> None:
    assert server.get("/health") == (200, {"status": "ok"})
    assert server.family("EngineReplica")
    assert not server.family("haproxy")
