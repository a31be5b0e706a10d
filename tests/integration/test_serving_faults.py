"""Processes of the server die, freeze and are replaced; its clients receive complete responses."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from servers import Server, listening, save_talker, serving

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
    ) as started:
        yield started


@pytest.fixture(scope="module")
def expected(server: Server) -> list[tuple[str, list[int]]]:
    return complete(server)


def complete(server: Server) -> list[tuple[str, list[int]]]:
    status, body = server.post("/v1/branches", BODY)
    assert status == 200, body
    return [(output["text"], output["tokens"]) for output in (*body["branches"], body["reduce"])]


def stream(server: Server) -> list[tuple[str, list[int]]]:
    texts, tokens = [""] * 4, list[list[int]]([[], [], [], []])
    event = None
    for event in server.stream("/v1/branches", BODY):
        for delta in event.get("deltas", []) if isinstance(event, dict) else []:
            texts[delta["index"]] += delta["text"]
            tokens[delta["index"]] += [] if delta["token"] is None else [delta["token"]]
    assert event == "[DONE]"
    return list(zip(texts, tokens, strict=True))


def outputs_during(server: Server, act: Any, clients: int = 6) -> list[list[tuple[str, list[int]]]]:
    """The outputs of clients, half of them streams; `act` is called once all requests are decoded."""
    with ThreadPoolExecutor(clients) as pool:
        outputs = [pool.submit([complete, stream][number % 2], server) for number in range(clients)]
        deadline = time.monotonic() + 60
        while server.metric("live_branches") < clients:
            assert time.monotonic() < deadline
        act()
        return [output.result() for output in outputs]


def send_signal(server: Server, name: str, number: int) -> None:
    processes = server.family(name)
    assert processes, name
    processes[0].send_signal(number)


def wait_for_engines(server: Server, count: int = 2) -> None:
    deadline = time.monotonic() + 90
    while len(server.family("EngineReplica")) < count or server.get("/health")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_two_servers_on_one_machine_share_no_port(server: Server, shared_server: Server) -> None:
    ports, other_ports = (
        {port for _, port in listening(psutil.Process(one.process.pid))} for one in (server, shared_server)
    )
    assert ports
    assert ports & other_ports == set()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="killed"),
        pytest.param(signal.SIGSTOP, id="frozen", marks=pytest.mark.full),
    ],
)
def test_samples_are_resumed_when_their_engine_is_lost(server: Server, expected: Any, number: int) -> None:
    wait_for_engines(server)
    moved_before = server.metric("moved_samples_total")
    assert outputs_during(server, lambda: send_signal(server, "EngineReplica", number)) == [expected] * 6
    assert server.metric("moved_samples_total") > moved_before
    wait_for_engines(server)


def test_clients_do_not_notice_the_loss_of_the_controller(server: Server, expected: Any) -> None:
    wait_for_engines(server)
    assert (
        outputs_during(server, lambda: send_signal(server, "ServeController", signal.SIGKILL))
        == [expected] * 6
    )
    assert stream(server) == expected


@pytest.mark.parametrize("name", [pytest.param("haproxy", marks=pytest.mark.full), "Ingress"])
def test_proxy_and_ingress_are_back_in_seconds(server: Server, expected: Any, name: str) -> None:
    wait_for_engines(server)
    assert complete(server) == expected
    send_signal(server, name, signal.SIGKILL)
    lost_at, output = time.monotonic(), None
    while output != expected:
        assert time.monotonic() < lost_at + 60
        try:
            output = complete(server)
        except (OSError, AssertionError, ValueError):
            time.sleep(0.2)
    print(f"{name}: back after {time.monotonic() - lost_at:.1f} s")
    assert server.metric("live_branches") == 0  # nothing is decoded for clients whose connection was cut


def test_a_lost_engine_is_replaced_by_a_new_process(server: Server) -> None:
    wait_for_engines(server)
    before = {process.pid for process in server.family("EngineReplica")}
    psutil.Process(min(before)).kill()
    deadline = time.monotonic() + 90
    while len({process.pid for process in server.family("EngineReplica")} - before) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    wait_for_engines(server)
