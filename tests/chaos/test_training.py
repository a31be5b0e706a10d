"""Real SIGKILLs at a worker, at Ray Train's controller and at the driver, also while a checkpoint is being
written.

Whatever was killed, the run ends as an undisturbed one does: the same losses at the same steps, each logged
once, in one MLflow run, and the same adapter, bit for bit.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from runs import prepare

from parallelmind.storage import sha256

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 60, 4
WORKER, CONTROLLER = "ray::RayTrainWorker", "ray::TrainController"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model, data and settings. The adapter is large for its model, so that saving
    takes a while.
    """
    settings = {
        "validation_path": "data.jsonl",
        "validate_every": 7,
        "validation_branches": "[1, 3]",
        "lora_rank": 64,
        "lora_dropout": 0.1,
        "branches_per_sample": 3,
        "epochs": 9,
        "max_steps": STEPS,
        "accumulation_steps": 2,
        "log_every": 3,
        "checkpoint_every": EVERY,
    }
    return prepare(tmp_path_factory.mktemp("chaos"), 400, settings)


class Running:
    """A training command and the processes of its own Ray cluster."""

    def __init__(self, place: Path, name: str, workers: int) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
        command = [
            sys.executable,
            "-m",
            "workloads.train",
            "run.yaml",
            f"name={name}",
            f"num_workers={workers}",
        ]
        self.output = place / f"{name}.log"
        with open(self.output, "a") as log:
            self.driver = subprocess.Popen(command, cwd=place, env=env, stdout=log, stderr=subprocess.STDOUT)
        self.place, self.name = place, name

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.driver.pid).children(recursive=True)

    def find(self, title: str) -> list[psutil.Process]:
        found = []
        for process in self.family():
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it ended meanwhile
                continue
        return found

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            assert self.driver.poll() is None, self.output.read_text()[-3000:]
            assert time.monotonic() < deadline, self.output.read_text()[-3000:]
            time.sleep(0.002)

    def folder(self) -> Path:
        return next(iter((self.place / "runs").glob(f"{self.name}-*")), self.place / "nowhere")

    def step(self) -> int:
        """The newest step that a checkpoint was written at."""
        return max((int(path.name[5:]) for path in self.folder().glob("checkpoints/step-*")), default=0)

    def saving(self) -> bool:
        return any(self.folder().glob("checkpoints/.step-*"))

    def kill(self, title: str) -> None:
        for process in self.find(title)[:1]:
            process.kill()

    def end(self) -> str:
        assert self.driver.wait(timeout=300) == 0, self.output.read_text()[-3000:]
        return self.output.read_text()


def metrics(place: Path, name: str) -> list[tuple[str, int, float]]:
    """Every point of the one MLflow run of that name, but for those of the clock."""
    with sqlite3.connect(place / "mlflow.db") as database:
        runs = database.execute(
            "SELECT run_uuid, status FROM runs WHERE name LIKE ?", (f"{name}-%",)
        ).fetchall()
        assert [status for _, status in runs] == ["FINISHED"]
        clock = "('tokens_per_second', 'peak_memory_gib', 'seconds')"
        query = f"SELECT key, step, value FROM metrics WHERE run_uuid = ? AND key NOT IN {clock}"
        return sorted(database.execute(query, (runs[0][0],)).fetchall())


def outcome(place: Path, running: Running) -> tuple[list[tuple[str, int, float]], str]:
    return metrics(place, running.name), sha256(running.folder() / "adapter" / "adapter_model.safetensors")


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all have ended, some time after what they belong to was killed."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if not any(
            process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes
        ):
            return True
        time.sleep(0.5)
    return False


@pytest.fixture(
    params=[2, pytest.param(1, marks=pytest.mark.chaos)], ids=["2 workers", "1 worker"], scope="module"
)
def undisturbed(place: Path, request: pytest.FixtureRequest) -> tuple[int, list[tuple[str, int, float]], str]:
    running = Running(place, f"whole{request.param}", request.param)
    running.end()
    points, adapter = outcome(place, running)
    assert {key for key, _, _ in points} >= {"loss", "gradient_norm", "validation/loss_3"}
    return request.param, points, adapter


def test_killed_anywhere_the_run_ends_as_if_undisturbed(
    place: Path, undisturbed: tuple[int, list, str]
) -> None:
    """A worker while it saves, then the controller, then the driver while a checkpoint is being written."""
    workers, points, adapter = undisturbed
    name = f"killed{workers}"
    running = Running(place, name, workers)
    running.wait_for(lambda: running.step() >= 2 * EVERY)
    running.wait_for(running.saving)
    running.kill(WORKER)
    running.wait_for(lambda: "lost a worker" in running.output.read_text())
    running.wait_for(lambda: running.find(CONTROLLER) and running.step() >= 5 * EVERY)
    running.kill(CONTROLLER)
    running.wait_for(lambda: "lost a controller" in running.output.read_text())
    running.wait_for(lambda: running.step() >= 8 * EVERY)
    running.wait_for(running.saving)
    family = running.family()
    running.driver.kill()
    again = Running(place, name, workers)  # at once, whatever of the old cluster is still there
    assert again.end().count("resuming from") == 3
    assert outcome(place, again) == (points, adapter)
    assert gone(family), "processes of the killed driver's cluster live on"
