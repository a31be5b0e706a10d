"""Engines on two nodes: one of them dies, or cannot be reached for half a minute, and every request is
answered as ever.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
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
CUT_S, CLIENTS = 30, 4
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
    """The application for clusters, with one engine on each of two nodes; returns it once both are up."""
    config = yaml.safe_load((ROOT / "serving" / "serve.yaml").read_text(encoding="utf-8"))
    config["proxy_location"] = "HeadOnly"  # the nodes are one machine
    config["http_options"] = {"host": "0.0.0.0", "port": free_port()}
    (application,) = config["applications"]
    application["args"] = {"base_model": base, "min_replicas": 2, "max_replicas": 2, "num_cpus": 2}
    application["runtime_env"] = {}
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    dashboard = f"http://127.0.0.1:{cluster.dashboard}"
    line = [
        sys.executable,
        "-m",
        "ray.serve.scripts",
        "deploy",
        str(folder / "serve.yaml"),
        "--address",
        dashboard,
    ]
    done = subprocess.run(
        cluster.host.command(*line),
        cwd=ROOT,
        env=cluster.host.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = Server(cluster.nodes[0].process, config["http_options"]["port"], folder / "log", cluster.host.ip)
    wait_for(lambda: healthy(found) and all(node.family("EngineReplica") for node in cluster.nodes[1:]))
    return found


def healthy(server: Server) -> bool:
    try:
        return server.get("/health")[0] == 200
    except (OSError, ValueError):
        return False


def wait_for(holds: Any) -> None:
    deadline = time.monotonic() + 180
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.3)


def asked(server: Server, stream: bool) -> list[list[int]]:
    """Tokens of both branches; an answer that is cut short or refused fails."""
    if not stream:
        status, found = server.post("/v1/branches", BODY)
        assert status == 200, found
        return [branch["tokens"] for branch in found["branches"]]
    tokens: list[list[int]] = [[], []]
    event: Any = None
    for event in server.stream("/v1/branches", BODY):
        for delta in event.get("deltas", []) if isinstance(event, dict) else []:
            tokens[delta["index"]] += [] if delta["token"] is None else [delta["token"]]
    assert event == "[DONE]"
    return tokens


@contextmanager
def load(server: Server) -> Iterator[list[int]]:
    """Clients that ask again and again until the end of the block, half of them for streams; all get what a
    quiet server says.
    """
    expected, over, answered = asked(server, False), threading.Event(), [0]

    def ask(number: int) -> None:
        while not over.is_set():
            assert asked(server, stream=number % 2 == 0) == expected
            answered[0] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask, number) for number in range(CLIENTS)]
        try:
            wait_for(lambda: answered[0] >= CLIENTS)
            yield answered
        finally:
            over.set()
        for each in asking:
            each.result()


def without_front(cluster: Nodes) -> Node:
    """A node with an engine alone: who loses the way in notices."""
    return next(node for node in cluster.nodes[1:] if not node.family("Ingress"))


def test_a_lost_node_is_not_noticed(base: str, tmp_path: Path) -> None:
    with (
        nodes.network("head", "a", "b") as (head, a, b),
        nodes.cluster(cpus=1, place=head, serves=True) as cluster,
    ):
        places = {id(cluster.add(cpus=3, place=place)): place for place in (a, b)}
        cluster.wait_for(3)
        server = deploy(cluster, base, tmp_path)
        with load(server) as answered:
            lost = without_front(cluster)
            lost.kill()
            before = answered[0]
            wait_for(lambda: answered[0] > before + 3 * CLIENTS)
            cluster.nodes.remove(lost)
            joined = cluster.add(cpus=3, place=places[id(lost)])
            wait_for(lambda: joined.family("EngineReplica"))
            before = answered[0]
            wait_for(lambda: answered[0] > before + 3 * CLIENTS)


def test_a_network_that_is_cut_for_half_a_minute(base: str, tmp_path: Path) -> None:
    with nodes.network("a", "b") as (here, there), nodes.cluster(cpus=3, place=here, serves=True) as cluster:
        cluster.add(cpus=2, place=there)
        cluster.wait_for(2)
        server = deploy(cluster, base, tmp_path)
        with load(server) as answered:
            with nodes.disconnect(there):
                time.sleep(CUT_S)
            before = answered[0]
            wait_for(lambda: answered[0] > before + 3 * CLIENTS)
