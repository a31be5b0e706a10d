"""The server answers whatever is sent to it in OpenAI's format, and keeps running."""

from __future__ import annotations

import pytest
from servers import Server

from benchmarks.fuzz import Findings, fuzz

pytestmark = pytest.mark.slow
COUNT = 400


def pids(server: Server) -> list[int]:
    return [process.pid for name in ("EngineReplica", "Ingress") for process in server.family(name)]


@pytest.fixture(scope="module")
def findings(shared_server: Server) -> Findings:
    return fuzz(shared_server.url, COUNT)


def test_every_request_is_answered_and_none_fails(findings: Findings) -> None:
    assert findings.statuses.total() >= COUNT
    assert (findings.failed, findings.unanswered) == ([], []), str(findings)


def test_some_requests_are_served_and_most_are_rejected_in_openais_format(findings: Findings) -> None:
    assert findings.malformed == []
    assert findings.statuses[200] > COUNT / 20
    assert sum(count for status, count in findings.statuses.items() if 400 <= status < 500) > COUNT / 2


def test_the_processes_survive_and_serve_the_next_request(shared_server: Server) -> None:
    before = pids(shared_server)
    fuzz(shared_server.url, COUNT // 4, seed=1)
    assert pids(shared_server) == before
    assert len(before) == 2
    status, response = shared_server.post(
        "/v1/completions", {"model": "base", "prompt": "the question", "max_tokens": 4}
    )
    assert (status, response["usage"]["completion_tokens"]) == (200, 4)
