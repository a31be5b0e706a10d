"""A node of the cluster gets a real SIGKILL while a worker trains on it; the run goes on with the other one,
and with two again as soon as another node is there. Whoever trains, every record is trained on once an epoch,
and every step is logged once.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from runs import prepare

ROOT = Path(__file__).resolve().parents[2]
RECORDS, EPOCHS, EVERY = 600, 12, 10
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}  # has room for one worker


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that has no room for workers, and two nodes."""
    folder = tempfile.mkdtemp(prefix="pm-")  # short: socket paths may have 107 characters
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    local = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder}
    with patch.dict(os.environ, local, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", PYTHONPATH=paths):
        nodes = Cluster(
            initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": True}
        )
        try:
            for _ in range(2):
                nodes.add_node(**NODE)
            yield nodes
        finally:
            nodes.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A working directory with a model, data and settings. No node was started in it."""
    settings = {
        "branches_per_sample": 3,
        "epochs": EPOCHS,
        "log_every": 1,
        "checkpoint_every": EVERY,
        "num_workers": 2,
        "min_workers": 1,
    }
    return prepare(tmp_path, RECORDS, settings)


class Running:
    """A training command on a cluster that was there before it."""

    def __init__(self, place: Path, address: str) -> None:
        self._place, self._output = place, place / "output"
        command = [sys.executable, "-m", "workloads.train", "run.yaml", f"ray_address={address}"]
        with open(self._output, "w") as log:
            self.driver = subprocess.Popen(command, cwd=place, stdout=log, stderr=subprocess.STDOUT)

    def said(self) -> str:
        return self._output.read_text()

    def step(self) -> int:
        """The newest step that a checkpoint was written at."""
        return max((int(path.name[5:]) for path in self._place.glob("runs/*/checkpoints/step-*")), default=0)

    def wait_for(
        self, condition: Callable[[], object], meanwhile: Callable[[], None] = lambda: time.sleep(0.2)
    ) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert self.driver.poll() is None, self.said()[-3000:]
            assert time.monotonic() < deadline, self.said()[-3000:]
            meanwhile()


def worker_on(node: Any) -> psutil.Process:
    """The worker that trains on a node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    living = [process for process in raylet.children() if process.status() != psutil.STATUS_ZOMBIE]
    (found,) = [process for process in living if "ray::RayTrainWorker" in " ".join(process.cmdline())]
    return found


def hold_back(worker: psutil.Process) -> None:
    """Stop it for most of a second: on a fast machine too, it must not be done before another joins."""
    try:
        worker.suspend()
        time.sleep(0.9)
        worker.resume()
    except psutil.NoSuchProcess:
        pass
    time.sleep(0.1)


@pytest.mark.chaos
def test_a_run_goes_on_with_fewer_workers_while_a_node_is_lost(cluster: Cluster, place: Path) -> None:
    running = Running(place, cluster.address)
    try:
        running.wait_for(lambda: running.step() >= 2 * EVERY)
        assert running.said().count("2 of 2 workers") == 1
        lost, kept = cluster.worker_nodes
        lost.kill_raylet()
        running.wait_for(lambda: "1 of 2 workers" in running.said())
        reached = running.step()
        running.wait_for(lambda: running.step() > reached)
        alone = worker_on(kept)
        cluster.add_node(**NODE)
        running.wait_for(lambda: running.said().count("2 of 2 workers") == 2, lambda: hold_back(alone))
        assert running.driver.wait(timeout=200) == 0, running.said()[-3000:]
    finally:
        running.driver.kill()
    said = running.said()
    assert "lost a worker; restarting" in said
    assert said.count("resuming from") >= 2
    assert len(list(place.glob("runs/*/adapter/parallelmind.json"))) == 1
    with sqlite3.connect(place / "mlflow.db") as database:
        assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
        branches = database.execute(
            "SELECT step, value FROM metrics WHERE key = 'branches' ORDER BY step"
        ).fetchall()
        points = Counter(database.execute("SELECT key, step FROM metrics").fetchall())
    assert [step for step, _ in branches] == list(range(1, len(branches) + 1))
    assert set(points.values()) == {1}
    assert branches[-1][1] == RECORDS * EPOCHS


@pytest.mark.parametrize(
    ("nodes", "workers", "cpus"),
    [
        ([1, 1], 2, 0.6),
        ([0, 1, 1], 2, 0.6),
        ([8, 8], 2, 4.8),
        ([1, 4, 4], 2, 2.4),
        ([2], 3, 0.4),
        ([1], 10, 0.06),
    ],
)
def test_an_elastic_worker_takes_most_of_its_part_of_a_node(
    monkeypatch: pytest.MonkeyPatch, nodes: list[float], workers: int, cpus: float
) -> None:
    with patch.dict(os.environ):  # Ray's settings are for a process of its own
        from workloads.common.resources import cpus_per_elastic_worker
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": found}} for found in nodes]
    )
    assert cpus_per_elastic_worker(workers) == cpus
