"""MLflow that fails: first uses of a database at once or killed, and a server that goes away."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from parallelmind.config import TrainConfig
from parallelmind.remote import RemotePath
from serving.runtime.ports import free_port
from workloads.train.run_dir import RunDir
from workloads.train.run_tracking import RunTracking

CONFIG = TrainConfig(data_path="data.jsonl")
SPAWN = multiprocessing.get_context("spawn")


def start(uri: str, name: str) -> None:
    from parallelmind.tracking import Tracker

    Tracker.start(uri, "tests", name, CONFIG, name).log_metrics({"loss": 1.0}, 1)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_first_uses_at_once_all_work(tmp_path: Path, count: int) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    processes = [SPAWN.Process(target=start, args=(uri, f"run{number}")) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (count,)


def begin(uri: str, ready: object) -> None:
    import parallelmind.tracking  # noqa: F401  (the kill shall hit the database, not the imports)

    ready.set()  # type: ignore[attr-defined]
    start(uri, "killed")


@pytest.mark.slow
@pytest.mark.full
def test_a_start_works_after_a_kill_at_any_moment_of_the_first_one(tmp_path: Path) -> None:
    moments = random.Random(0)
    for number in range(8):
        uri = f"sqlite:///{tmp_path}/{number}/mlflow.db"
        ready = SPAWN.Event()
        process = SPAWN.Process(target=begin, args=(uri, ready))
        process.start()
        ready.wait()
        time.sleep(moments.uniform(0, 5))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        start(uri, "killed")


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[None]:
    """A real server of the database in `folder`, which answers; it is killed at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with open(folder / "server.log", "ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not answers(port):
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.full
def test_a_server_that_is_killed_and_comes_back_has_every_metric(tmp_path: Path) -> None:
    from parallelmind.tracking import Tracker

    port = free_port()
    uri, lines = f"http://127.0.0.1:{port}", list[str]()
    run_dir = RunDir(RemotePath(tmp_path / "run"), "adapter", "")
    with mlflow_server(tmp_path, port):
        run_id = Tracker.start(uri, "tests", "one", CONFIG, "key").run_id
        sender = RunTracking(run_dir, uri, run_id, None, lines.append)
        sender.log({"loss": 1.0}, 1)
        deadline = time.monotonic() + 60
        while not Tracker(uri, run_id).metric_names():
            assert time.monotonic() < deadline
    started = time.monotonic()
    for step in range(2, 50):
        sender.log({"loss": float(step)}, step)
    assert time.monotonic() - started < 1
    deadline = time.monotonic() + 60
    while not lines:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run_dir.result.local.mkdir()
    (run_dir.result.local / "weights").write_text("w")
    run_dir.loss_plot.local.write_text("plot")
    with mlflow_server(tmp_path, port):
        sender.finish(run_dir.result.local)
        assert Tracker(uri, run_id).metric_history("loss") == [(step, float(step)) for step in range(1, 50)]
    assert not run_dir.has_unsent()
    assert list((tmp_path / "artifacts").rglob("adapter/weights"))
