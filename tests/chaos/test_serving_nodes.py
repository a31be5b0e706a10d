"""Engines on two nodes: one node is killed, or disconnected for half a minute; responses stay complete."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nodes
import pytest
import yaml
from nodes import Node, Nodes
from servers import ROOT, Server, save_talker

from serving.runtime.ports import free_port

pytestmark = [pytest.mark.chaos, nodes.requires_namespaces]
DISCONNECTED_S, CLIENTS = 30, 4
BODY: dict[str, Any] = {
    "model": "talker",
    "main": "the passage says who works where.",
    "branches": [{"text": " who?", "temperature": 1.0, "seed": 5}, {"text": " where is the work?"}],
    "max_tokens": 200,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_talker(tmp_path_factory.mktemp("serving") / "talker")


def deploy(cluster: Nodes, base: str, folder: Path) -> Server:
    """Deploy serve.yaml with one engine on each of two nodes; return the server once both engines run."""
    config = yaml.safe_load((ROOT / "serving" / "serve.yaml").read_text(encoding="utf-8"))
    config["proxy_location"] = "HeadOnly"  # the nodes share one machine
    config["http_options"] = {"host": "0.0.0.0", "port": free_port()}
    (application,) = config["applications"]
    application["args"] = {"base_model": base, "min_replicas": 2, "max_replicas": 2, "num_cpus": 2}
    application["runtime_env"] = {}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    dashboard = f"http://127.0.0.1:{cluster.dashboard}"
    command = [
        sys.executable,
        "-m",
        "ray.serve.scripts",
        "deploy",
        str(folder / "serve.yaml"),
        "--address",
        dashboard,
    ]
    completed = subprocess.run(
        cluster.host.command(*command),
        cwd=ROOT,
        env=cluster.host.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    server = Server(cluster.nodes[0].process, config["http_options"]["port"], folder / "log", cluster.host.ip)
    wait_for(lambda: is_healthy(server) and all(node.family("EngineReplica") for node in cluster.nodes[1:]))
    return server


def is_healthy(server: Server) -> bool:
    try:
        return server.get("/health")[0] == 200
    except (OSError, ValueError):
        return False


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def outputs_of(server: Server, stream: bool) -> list[list[int]]:
    """Tokens of both branches of one request; fails if it is rejected or its stream is cut off."""
    if not stream:
        status, response = server.post("/v1/branches", BODY)
        assert status == 200, response
        return [branch["tokens"] for branch in response["branches"]]
    tokens: list[list[int]] = [[], []]
    event: Any = None
    for event in server.stream("/v1/branches", BODY):
        for delta in event.get("deltas", []) if isinstance(event, dict) else []:
            tokens[delta["index"]] += [] if delta["token"] is None else [delta["token"]]
    assert event == "[DONE]"
    return tokens


@contextmanager
def load(server: Server) -> Iterator[list[int]]:
    """Send requests from several clients until the end of the block, half of them streamed.

    Every response must equal that of the idle server. Yields a list with the number of responses.
    """
    expected, stopped, answered = outputs_of(server, False), threading.Event(), [0]

    def send_requests(number: int) -> None:
        while not stopped.is_set():
            assert outputs_of(server, stream=number % 2 == 0) == expected
            answered[0] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        running_clients = [pool.submit(send_requests, number) for number in range(CLIENTS)]
        try:
            wait_for(lambda: answered[0] >= CLIENTS)
            yield answered
        finally:
            stopped.set()
        for client in running_clients:
            client.result()


def node_without_ingress(cluster: Nodes) -> Node:
    """A node with an engine and no ingress: clients notice the loss of their ingress."""
    return next(node for node in cluster.nodes[1:] if not node.family("Ingress"))


def test_clients_do_not_notice_a_killed_node(base: str, tmp_path: Path) -> None:
    with (
        nodes.network("head", "a", "b") as (head, a, b),
        nodes.cluster(cpus=1, host=head, serves=True) as cluster,
    ):
        hosts = {id(cluster.add(cpus=3, host=host)): host for host in (a, b)}
        cluster.wait_for(3)
        server = deploy(cluster, base, tmp_path)
        with load(server) as answered:
            lost_node = node_without_ingress(cluster)
            lost_node.kill()
            before = answered[0]
            wait_for(lambda: answered[0] > before + 3 * CLIENTS)
            cluster.nodes.remove(lost_node)
            new_node = cluster.add(cpus=3, host=hosts[id(lost_node)])
            wait_for(lambda: new_node.family("EngineReplica"))
            before = answered[0]
            wait_for(lambda: answered[0] > before + 3 * CLIENTS)


def test_clients_do_not_notice_a_node_that_is_disconnected_for_half_a_minute(
    base: str, tmp_path: Path
) -> None:
    with (
        nodes.network("a", "b") as (near_host, far_host),
        nodes.cluster(cpus=3, host=near_host, serves=True) as cluster,
    ):
        cluster.add(cpus=2, host=far_host)
        cluster.wait_for(2)
        server = deploy(cluster, base, tmp_path)
        with load(server) as answered:
            with nodes.disconnect(far_host):
                time.sleep(DISCONNECTED_S)
            before = answered[0]
            wait_for(lambda: answered[0] > before + 3 * CLIENTS)
