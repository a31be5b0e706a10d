"""Training on two nodes: one of them dies, or is out of reach for half a minute. The run ends as if nothing
had happened.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nodes
import pytest
from nodes import Nodes
from runs import prepare

from parallelmind.storage import sha256

pytestmark = [pytest.mark.chaos, nodes.requires_namespaces]
EVERY, CUT_S = 10, 30
SETTINGS = {
    "branches_per_sample": 3,
    "epochs": 4,
    "log_every": 1,
    "checkpoint_every": EVERY,
    "num_workers": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model, data and settings, that all nodes see."""
    return prepare(tmp_path_factory.mktemp("nodes"), 600, SETTINGS)


def start(place: Path, cluster: Nodes, name: str) -> subprocess.Popen[bytes]:
    line = [
        sys.executable,
        "-m",
        "workloads.train",
        "run.yaml",
        f"output_dir={name}",
        f"ray_address={cluster.address}",
    ]
    line.append(f"mlflow_uri=sqlite:///{name}.db")
    with open(place / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            cluster.host.command(*line),
            cwd=place,
            env=cluster.host.environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def said(place: Path, name: str) -> str:
    return (place / f"{name}.log").read_text()


def wait_for(running: subprocess.Popen[bytes], place: Path, name: str, holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 240
    while not holds():
        assert running.poll() is None, said(place, name)[-3000:]
        assert time.monotonic() < deadline, said(place, name)[-3000:]
        time.sleep(0.1)


def weights(place: Path, name: str) -> str:
    (found,) = (place / name).glob("*/adapter/adapter_model.safetensors")
    return sha256(found)


def steps(place: Path, name: str) -> int:
    return max((int(path.name[5:]) for path in (place / name).glob("*/checkpoints/step-*")), default=0)


def ended(running: subprocess.Popen[bytes], place: Path, name: str) -> None:
    assert running.wait(timeout=300) == 0, said(place, name)[-3000:]


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[bytes]]]:
    """What a test has started and may not have ended."""
    begun: list[subprocess.Popen[bytes]] = []
    yield begun
    for each in begun:
        each.kill()


def test_a_killed_node_and_one_that_joins(place: Path, running: list[subprocess.Popen[bytes]]) -> None:
    with nodes.network("head", "a", "b") as (head, a, b), nodes.cluster(cpus=0, place=head) as cluster:
        first, _ = cluster.add(cpus=1, place=a), cluster.add(cpus=1, place=b)
        cluster.wait_for(3)
        running.append(start(place, cluster, "whole"))
        ended(running[-1], place, "whole")
        running.append(start(place, cluster, "killed"))
        wait_for(running[-1], place, "killed", lambda: steps(place, "killed") >= 2 * EVERY)
        first.kill()
        cluster.add(cpus=1, place=a)
        ended(running[-1], place, "killed")
    assert "lost a worker" in said(place, "killed")
    assert weights(place, "killed") == weights(place, "whole")


def test_a_network_that_is_cut_for_half_a_minute(place: Path, running: list[subprocess.Popen[bytes]]) -> None:
    with nodes.network("a", "b") as (here, there), nodes.cluster(cpus=1, place=here) as cluster:
        far = cluster.add(cpus=1, place=there)
        cluster.wait_for(2)
        running.append(start(place, cluster, "uncut"))
        ended(running[-1], place, "uncut")
        running.append(start(place, cluster, "cut"))
        wait_for(running[-1], place, "cut", lambda: steps(place, "cut") >= 2 * EVERY)
        with nodes.disconnect(there):
            time.sleep(CUT_S)
        if not far.alive():  # it was given up; whoever looks after nodes starts it again
            cluster.add(cpus=1, place=there)
        ended(running[-1], place, "cut")
    assert weights(place, "cut") == weights(place, "uncut")
