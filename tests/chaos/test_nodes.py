"""Training on two nodes: one is killed, or disconnected for half a minute; the result stays the same."""

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
CHECKPOINT_EVERY, DISCONNECTED_S = 10, 30
SETTINGS = {
    "branches_per_sample": 3,
    "epochs": 4,
    "log_every": 1,
    "checkpoint_every": CHECKPOINT_EVERY,
    "num_workers": 2,
}


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model, data and settings; all nodes share it."""
    return prepare(tmp_path_factory.mktemp("nodes"), 600, SETTINGS)


def start_training(cwd: Path, cluster: Nodes, name: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "workloads.train",
        "run.yaml",
        f"output_dir={name}",
        f"ray_address={cluster.address}",
    ]
    command.append(f"mlflow_uri=sqlite:///{name}.db")
    with open(cwd / f"{name}.log", "wb") as output:
        return subprocess.Popen(
            cluster.host.command(*command),
            cwd=cwd,
            env=cluster.host.environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def read_log(cwd: Path, name: str) -> str:
    return (cwd / f"{name}.log").read_text()


def wait_for(process: subprocess.Popen[bytes], cwd: Path, name: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, read_log(cwd, name)[-3000:]
        assert time.monotonic() < deadline, read_log(cwd, name)[-3000:]
        time.sleep(0.1)


def adapter_hash(cwd: Path, name: str) -> str:
    (file,) = (cwd / name).glob("*/adapter/adapter_model.safetensors")
    return sha256(file)


def checkpoint_step(cwd: Path, name: str) -> int:
    return max((int(path.name[5:]) for path in (cwd / name).glob("*/checkpoints/step-*")), default=0)


def wait_for_success(process: subprocess.Popen[bytes], cwd: Path, name: str) -> None:
    assert process.wait(timeout=300) == 0, read_log(cwd, name)[-3000:]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that the test adds when it starts them; they are killed at its end."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()


def test_a_killed_node_is_replaced_by_one_that_joins(
    cwd: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    with nodes.network("head", "a", "b") as (head, a, b), nodes.cluster(cpus=0, host=head) as cluster:
        first_node, _ = cluster.add(cpus=1, host=a), cluster.add(cpus=1, host=b)
        cluster.wait_for(3)
        started.append(start_training(cwd, cluster, "whole"))
        wait_for_success(started[-1], cwd, "whole")
        started.append(start_training(cwd, cluster, "killed"))
        wait_for(started[-1], cwd, "killed", lambda: checkpoint_step(cwd, "killed") >= 2 * CHECKPOINT_EVERY)
        first_node.kill()
        cluster.add(cpus=1, host=a)
        wait_for_success(started[-1], cwd, "killed")
    assert "lost a worker" in read_log(cwd, "killed")
    assert adapter_hash(cwd, "killed") == adapter_hash(cwd, "whole")


def test_a_node_is_disconnected_for_half_a_minute(cwd: Path, started: list[subprocess.Popen[bytes]]) -> None:
    with nodes.network("a", "b") as (near_host, far_host), nodes.cluster(cpus=1, host=near_host) as cluster:
        far_node = cluster.add(cpus=1, host=far_host)
        cluster.wait_for(2)
        started.append(start_training(cwd, cluster, "uncut"))
        wait_for_success(started[-1], cwd, "uncut")
        started.append(start_training(cwd, cluster, "cut"))
        wait_for(started[-1], cwd, "cut", lambda: checkpoint_step(cwd, "cut") >= 2 * CHECKPOINT_EVERY)
        with nodes.disconnect(far_host):
            time.sleep(DISCONNECTED_S)
        if not far_node.alive():  # the cluster gave it up; an operator starts it again
            cluster.add(cpus=1, host=far_host)
        wait_for_success(started[-1], cwd, "cut")
    assert adapter_hash(cwd, "cut") == adapter_hash(cwd, "uncut")
