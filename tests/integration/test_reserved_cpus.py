"""Training reserves all CPUs of a cluster, and reads its data beside the workers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import clusters
import pytest
from runs import prepare
from servers import ROOT

from serving.runtime.ports import free_port

PYTHON = Path(sys.executable)
FILES = 8  # more than are read without Ray Data


def train(cwd: Path, gcs_port: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}",
        "RAY_ADDRESS": f"127.0.0.1:{gcs_port}",
        "OMP_NUM_THREADS": "1",  # of `ray job submit`
    }
    return subprocess.run(
        [PYTHON, "-m", "workloads.train", "run.yaml", *arguments],
        cwd=cwd,
        env={
            name: value
            for name, value in clusters.environment(PYTHON, **settings).items()
            if name != "OMP_THREAD_LIMIT"
        },
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    """A working directory whose data is divided over many files."""
    prepare(tmp_path, 120, {"branches_per_sample": 3, "log_every": 1})
    lines = (tmp_path / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data").mkdir()
    for index in range(FILES):
        (tmp_path / "data" / f"{index}.jsonl").write_text("".join(lines[index::FILES]))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpus", "workers", "threads"),
    [(1, 2, 1), pytest.param(2, 2, 1, marks=pytest.mark.full), pytest.param(2, 1, 2, marks=pytest.mark.full)],
)
def test_readers_never_wait_for_a_cpu(cwd: Path, cpus: int, workers: int, threads: int) -> None:
    """The workers reserve every CPU, so a reader that needed one would wait for ever."""
    port = free_port()
    # The limit of conftest.py holds for the workers of a cluster, too.
    with clusters.cluster(PYTHON, cpus, gcs_port=port, OMP_THREAD_LIMIT="8"):
        completed = train(cwd, port, "data_path=data", f"num_workers={workers}")
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert f"{workers} of {workers} workers, threads of each: {threads}" in completed.stdout
    assert f"step {10 // workers}/{10 // workers}" in completed.stdout
    assert "Deprecat" not in completed.stderr


@pytest.mark.full
@pytest.mark.slow
def test_a_gpu_that_torch_cannot_use_is_an_error_of_one_line(cwd: Path) -> None:
    """Ray believes in a GPU, as on a node with one and a torch for CPUs; `use_gpu=auto` takes it."""
    port = free_port()
    with clusters.cluster(PYTHON, gcs_port=port, options=["--num-gpus=1"]):
        completed = train(cwd, port)
        unused = train(cwd, port, "use_gpu=false", "name=cpu", "max_steps=1")
    assert completed.returncode == 2
    (line,) = [line for line in completed.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: use_gpu=true: torch "), line
    assert "install a torch that is built for its driver, or set use_gpu=false" in line
    assert unused.returncode == 0, unused.stderr[-3000:]
    assert "note: 1 GPU(s) stay unused: use_gpu=false" in unused.stderr


@pytest.mark.full
@pytest.mark.slow
def test_a_run_on_a_busy_cluster_says_what_it_waits_for(cwd: Path) -> None:
    port = free_port()
    hold = "ray.remote(num_cpus=2)(lambda: time.sleep(15)).remote(); time.sleep(16)"
    with clusters.cluster(PYTHON, 2, gcs_port=port):
        address = {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        with subprocess.Popen(
            [PYTHON, "-c", f"import ray, time; ray.init(); {hold}"],
            env=clusters.environment(PYTHON, **address),
        ):
            completed = train(cwd, port, "max_steps=1")
    assert completed.returncode == 0, completed.stderr[-3000:]
    assert "waiting for 2 CPUs (0 free); training starts when they are free" in completed.stderr
