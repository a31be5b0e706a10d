"""Whatever is sent to a server, it answers, in OpenAI's shape, and goes on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers import Server, save_talker, serving

from benchmarks.fuzz import Findings, fuzz

pytestmark = pytest.mark.slow
COUNT = 400
LIMITS = {"max_prompt_tokens": 512, "max_new_tokens": 64, "slow_client_s": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("fuzz")
    with serving(
        folder / "server", base_model=save_talker(folder / "talker"), adapter_root=str(folder), **LIMITS
    ) as found:
        yield found


def pids(server: Server) -> list[int]:
    return [process.pid for name in ("EngineReplica", "Ingress") for process in server.family(name)]


@pytest.fixture(scope="module")
def findings(server: Server) -> Findings:
    return fuzz(server.url, COUNT)


def test_every_request_is_answered_and_none_is_a_failure(findings: Findings) -> None:
    assert findings.statuses.total() >= COUNT
    assert (findings.failed, findings.unanswered) == ([], []), str(findings)


def test_some_are_served_and_most_are_refused_in_openais_shape(findings: Findings) -> None:
    assert findings.malformed == []
    assert findings.statuses[200] > COUNT / 20
    assert sum(count for status, count in findings.statuses.items() if 400 <= status < 500) > COUNT / 2


def test_nobody_dies_of_it_and_who_asks_next_is_served(server: Server) -> None:
    before = pids(server)
    fuzz(server.url, COUNT // 4, seed=1)
    assert pids(server) == before
    assert len(before) == 2
    status, found = server.post(
        "/v1/completions", {"model": "base", "prompt": "the question", "max_tokens": 4}
    )
    assert (status, found["usage"]["completion_tokens"]) == (200, 4)
