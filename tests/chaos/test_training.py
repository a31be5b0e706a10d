"""SIGKILL of a worker, of Ray Train's controller and of the driver, also while a checkpoint is written.

The run has the same result as an undisturbed one: the same losses at the same steps, each logged once in one
MLflow run, and the same adapter, bit for bit.
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
STEPS, CHECKPOINT_EVERY = 60, 4
WORKER, CONTROLLER = "ray::RayTrainWorker", "ray::TrainController"

pytestmark = [pytest.mark.slow, pytest.mark.full]


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model, data and settings.

    The adapter is large for its model: a kill can hit a checkpoint while it is written.
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
        "checkpoint_every": CHECKPOINT_EVERY,
    }
    return prepare(tmp_path_factory.mktemp("chaos"), 400, settings)


class TrainingCommand:
    """A running training command with its own Ray cluster."""

    def __init__(self, cwd: Path, name: str, workers: int, **variables: str) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
        command = [
            sys.executable,
            "-m",
            "workloads.train",
            "run.yaml",
            f"name={name}",
            f"num_workers={workers}",
        ]
        self.log = cwd / f"{name}.log"
        with open(self.log, "a") as output:
            self.driver = subprocess.Popen(command, cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT)
        self.cwd, self.name = cwd, name

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.driver.pid).children(recursive=True)

    def find(self, title: str) -> list[psutil.Process]:
        processes = []
        for process in self.family():
            try:
                if title in " ".join(process.cmdline()):
                    processes.append(process)
            except psutil.Error:  # the process has ended
                continue
        return processes

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            assert self.driver.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.002)

    def run_dir(self) -> Path:
        return next(iter((self.cwd / "runs").glob(f"{self.name}-*")), self.cwd / "nowhere")

    def checkpoint_step(self) -> int:
        """The step of the newest checkpoint."""
        return max((int(path.name[5:]) for path in self.run_dir().glob("checkpoints/step-*")), default=0)

    def is_saving(self) -> bool:
        return any(self.run_dir().glob("checkpoints/.step-*"))

    def kill(self, title: str) -> None:
        for process in self.find(title)[:1]:
            process.kill()

    def end(self) -> str:
        assert self.driver.wait(timeout=300) == 0, self.log.read_text()[-3000:]
        return self.log.read_text()


def metric_points(cwd: Path, name: str) -> list[tuple[str, int, float]]:
    """Every metric point of the one MLflow run with this name, except timings and memory."""
    with sqlite3.connect(cwd / "mlflow.db") as database:
        runs = database.execute(
            "SELECT run_uuid, status FROM runs WHERE name LIKE ?", (f"{name}-%",)
        ).fetchall()
        assert [status for _, status in runs] == ["FINISHED"]
        clock = "('tokens_per_second', 'peak_memory_gib', 'seconds')"
        query = f"SELECT key, step, value FROM metrics WHERE run_uuid = ? AND key NOT IN {clock}"
        return sorted(database.execute(query, (runs[0][0],)).fetchall())


def outcome(cwd: Path, running: TrainingCommand) -> tuple[list[tuple[str, int, float]], str]:
    return metric_points(cwd, running.name), sha256(
        running.run_dir() / "adapter" / "adapter_model.safetensors"
    )


def all_ended(processes: list[psutil.Process]) -> bool:
    """Wait up to two minutes for the processes to end; return whether they have."""
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
def undisturbed(cwd: Path, request: pytest.FixtureRequest) -> tuple[int, list[tuple[str, int, float]], str]:
    running = TrainingCommand(cwd, f"whole{request.param}", request.param)
    running.end()
    points, adapter = outcome(cwd, running)
    assert {key for key, _, _ in points} >= {"loss", "gradient_norm", "validation/loss_3"}
    return request.param, points, adapter


def test_a_run_that_is_killed_and_resumed_equals_an_undisturbed_one(
    cwd: Path, undisturbed: tuple[int, list, str]
) -> None:
    """Kills a worker while it saves, then the controller, then the driver while a checkpoint is written."""
    workers, points, adapter = undisturbed
    name = f"killed{workers}"
    running = TrainingCommand(cwd, name, workers)
    running.wait_for(lambda: running.checkpoint_step() >= 2 * CHECKPOINT_EVERY)
    running.wait_for(running.is_saving)
    running.kill(WORKER)
    running.wait_for(lambda: "lost a worker" in running.log.read_text())
    running.wait_for(lambda: running.find(CONTROLLER) and running.checkpoint_step() >= 5 * CHECKPOINT_EVERY)
    running.kill(CONTROLLER)
    running.wait_for(lambda: "lost a controller" in running.log.read_text())
    running.wait_for(lambda: running.checkpoint_step() >= 8 * CHECKPOINT_EVERY)
    running.wait_for(running.is_saving)
    family = running.family()
    running.driver.kill()
    restarted = TrainingCommand(cwd, name, workers)  # at once: processes of the old cluster may still run
    assert restarted.end().count("resuming from") == 3
    assert outcome(cwd, restarted) == (points, adapter)
    assert all_ended(family), "processes of the killed driver's cluster still run"


def test_a_worker_that_is_killed_for_lack_of_memory_leaves_its_cpus_to_the_next(cwd: Path) -> None:
    memory = psutil.virtual_memory()
    if memory.available < 8 << 30:
        pytest.skip("needs 8 GiB of free memory, of which it fills 5")
    least = memory.available - (5 << 30)
    limit = (memory.total - memory.available + (4 << 30)) / memory.total
    running = TrainingCommand(cwd, "memory", 1, RAY_memory_usage_threshold=f"{limit:.3f}")
    running.wait_for(lambda: running.checkpoint_step() >= CHECKPOINT_EVERY)
    held: list[bytes] = []

    def is_killed() -> bool:
        if psutil.virtual_memory().available > least:
            held.append(os.urandom(1 << 20) * 64)
        return "running low on memory" in running.log.read_text()

    running.wait_for(is_killed)
    held.clear()
    assert running.end().count("resuming from") >= 1
