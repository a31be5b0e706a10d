"""First uses of an MLflow database in SQLite: at once, and killed at any moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from parallelmind.config import TrainConfig

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
