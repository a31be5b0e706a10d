"""A node is killed (SIGKILL) while a worker trains on it, and another node joins.

The run continues with one worker, then with two again. Every record is trained on once an epoch, and every
step is logged once, whatever the number of workers.
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
from ray.cluster_utils import Cluster
from runs import prepare

ROOT = Path(__file__).resolve().parents[2]
RECORDS, EPOCHS, CHECKPOINT_EVERY = 600, 12, 10
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1"}  # has room for one worker


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room for workers, and two nodes with room for one worker each."""
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
def cwd(tmp_path: Path) -> Path:
    """A working directory with a model, data and settings; no node runs in it."""
    settings = {
        "branches_per_sample": 3,
        "epochs": EPOCHS,
        "log_every": 1,
        "checkpoint_every": CHECKPOINT_EVERY,
        "num_workers": 2,
        "min_workers": 1,
    }
    return prepare(tmp_path, RECORDS, settings)


class TrainingCommand:
    """A running training command on an existing cluster."""

    def __init__(self, cwd: Path, address: str) -> None:
        self._cwd, self._log = cwd, cwd / "output"
        command = [sys.executable, "-m", "workloads.train", "run.yaml", f"ray_address={address}"]
        with open(self._log, "w") as output:
            self.driver = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=subprocess.STDOUT)

    def output(self) -> str:
        return self._log.read_text()

    def checkpoint_step(self) -> int:
        """The step of the newest checkpoint."""
        return max((int(path.name[5:]) for path in self._cwd.glob("runs/*/checkpoints/step-*")), default=0)

    def wait_for(
        self, condition: Callable[[], object], between_polls: Callable[[], None] = lambda: time.sleep(0.2)
    ) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert self.driver.poll() is None, self.output()[-3000:]
            assert time.monotonic() < deadline, self.output()[-3000:]
            between_polls()


def worker_on(node: Any) -> psutil.Process:
    """The training worker of a node."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    processes = [process for process in raylet.children() if process.status() != psutil.STATUS_ZOMBIE]
    (worker,) = [process for process in processes if "ray::RayTrainWorker" in " ".join(process.cmdline())]
    return worker


def slow_down(worker: psutil.Process) -> None:
    """Suspend the worker for 0.9 s, so that the run does not end before another node joins."""
    try:
        worker.suspend()
        time.sleep(0.9)
        worker.resume()
    except psutil.NoSuchProcess:
        pass
    time.sleep(0.1)


@pytest.mark.chaos
def test_a_run_continues_with_fewer_workers_while_a_node_is_lost(cluster: Cluster, cwd: Path) -> None:
    running = TrainingCommand(cwd, cluster.address)
    try:
        running.wait_for(lambda: running.checkpoint_step() >= 2 * CHECKPOINT_EVERY)
        assert running.output().count("2 of 2 workers") == 1
        lost, kept = cluster.worker_nodes
        lost.kill_raylet()
        running.wait_for(lambda: "1 of 2 workers" in running.output())
        step_after_loss = running.checkpoint_step()
        running.wait_for(lambda: running.checkpoint_step() > step_after_loss)
        remaining_worker = worker_on(kept)
        cluster.add_node(**NODE)
        running.wait_for(
            lambda: running.output().count("2 of 2 workers") == 2, lambda: slow_down(remaining_worker)
        )
        assert running.driver.wait(timeout=200) == 0, running.output()[-3000:]
    finally:
        running.driver.kill()
    output = running.output()
    assert "lost a worker; restarting" in output
    assert output.count("resuming from") >= 2
    assert len(list(cwd.glob("runs/*/adapter/parallelmind.json"))) == 1
    with sqlite3.connect(cwd / "mlflow.db") as database:
        assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
        branches = database.execute(
            "SELECT step, value FROM metrics WHERE key = 'branches' ORDER BY step"
        ).fetchall()
        points = Counter(database.execute("SELECT key, step FROM metrics").fetchall())
    assert [step for step, _ in branches] == list(range(1, len(branches) + 1))
    assert set(points.values()) == {1}
    assert branches[-1][1] == RECORDS * EPOCHS
