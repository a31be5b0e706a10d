"""Processes of the server die, freeze and are replaced, and its clients are answered all the same."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from servers import Server, save_talker, serving

pytestmark = pytest.mark.slow
BODY: dict[str, Any] = {
    "model": "talker",
    "main": "the passage says who works where.",
    "branches": [
        {"text": " who?", "temperature": 1.0, "seed": 5},
        {"text": " where is the work?"},
        {"text": " when"},
    ],
    "reduce": " so",
    "max_tokens": 250,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("faults")
    base = save_talker(folder / "talker")
    with serving(
        folder / "server", complaints=True, base_model=base, min_replicas=2, max_replicas=2
    ) as found:
        yield found


@pytest.fixture(scope="module")
def expected(server: Server) -> list[tuple[str, list[int]]]:
    return unary(server)


def unary(server: Server) -> list[tuple[str, list[int]]]:
    status, found = server.post("/v1/branches", BODY)
    assert status == 200, found
    return [(branch["text"], branch["tokens"]) for branch in found["branches"]]


def streamed(server: Server) -> list[tuple[str, list[int]]]:
    texts, tokens = [""] * 4, list[list[int]]([[], [], [], []])
    event = None
    for event in server.stream("/v1/branches", BODY):
        for delta in event.get("deltas", []) if isinstance(event, dict) else []:
            texts[delta["index"]] += delta["text"]
            tokens[delta["index"]] += [] if delta["token"] is None else [delta["token"]]
    assert event == "[DONE]"
    return list(zip(texts, tokens, strict=True))


def during(server: Server, act: Any, clients: int = 6) -> list[list[tuple[str, list[int]]]]:
    """What clients get, half of them streams, while something happens as soon as all are being answered."""
    with ThreadPoolExecutor(clients) as pool:
        found = [pool.submit([unary, streamed][number % 2], server) for number in range(clients)]
        deadline = time.monotonic() + 60
        while server.metric("live_branches") < clients:
            assert time.monotonic() < deadline
        act()
        return [each.result() for each in found]


def signalled(server: Server, name: str, number: int) -> None:
    found = server.family(name)
    assert found, name
    found[0].send_signal(number)


def wait_for_engines(server: Server, count: int = 2) -> None:
    deadline = time.monotonic() + 90
    while len(server.family("EngineReplica")) < count or server.get("/health")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_samples_go_on_where_their_engine_was_lost(server: Server, expected: Any, number: int) -> None:
    wait_for_engines(server)
    moved = server.metric("moved_samples_total")
    assert during(server, lambda: signalled(server, "EngineReplica", number)) == [expected] * 6
    assert server.metric("moved_samples_total") > moved
    wait_for_engines(server)


def test_the_loss_of_the_controller_is_not_noticed(server: Server, expected: Any) -> None:
    wait_for_engines(server)
    assert during(server, lambda: signalled(server, "ServeController", signal.SIGKILL)) == [expected] * 6
    assert streamed(server) == expected


@pytest.mark.parametrize("name", ["haproxy", "Ingress"])
def test_the_way_in_is_back_in_seconds(server: Server, expected: Any, name: str) -> None:
    wait_for_engines(server)
    assert unary(server) == expected
    signalled(server, name, signal.SIGKILL)
    lost, found = time.monotonic(), None
    while found != expected:
        assert time.monotonic() < lost + 60
        try:
            found = unary(server)
        except (OSError, AssertionError, ValueError):
            time.sleep(0.2)
    print(f"{name}: back after {time.monotonic() - lost:.1f} s")
    assert server.metric("live_branches") == 0  # whoever was cut off is not worked for


def test_a_lost_engine_is_replaced_by_a_new_process(server: Server) -> None:
    wait_for_engines(server)
    before = {process.pid for process in server.family("EngineReplica")}
    psutil.Process(min(before)).kill()
    deadline = time.monotonic() + 90
    while len({process.pid for process in server.family("EngineReplica")} - before) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    wait_for_engines(server)
