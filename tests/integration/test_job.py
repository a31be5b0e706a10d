"""`ray job submit` against a cluster whose Python has the dependencies but not this project."""

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest
from tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
STARTUP_S = 60


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """A virtual environment that sees the installed packages, but not the editable install of this project.

    A folder named in a .pth file is searched, while the .pth files in it (ours among them) are not read.
    """
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "bin" / "python"
    found = subprocess.run([python, "-c", "import ray, torch; import parallelmind"], capture_output=True, text=True, cwd=folder)
    assert "No module named 'parallelmind'" in found.stderr
    return python


@pytest.fixture(scope="module")
def cluster(bare_python):
    """The address of a one-node cluster's dashboard; only this cluster's own processes are ended afterwards."""
    port = _free_port()
    env = _cluster_env(bare_python)
    command = [
        *(bare_python, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"),
        *(f"--port={_free_port()}", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}", "--disable-usage-stats"),
        *(f"--ray-client-server-port={_free_port()}", f"--dashboard-agent-listen-port={_free_port()}"),
        *(f"--object-store-memory={2**28}", "--include-dashboard=true"),
    ]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=bare_python.parent)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address)
        yield address
    finally:
        process.terminate()  # with --block it takes its raylet, GCS and dashboard along
        process.wait(timeout=60)


@pytest.fixture
def tiny_run(tmp_path):
    save_tiny(tmp_path / "base")
    with open(tmp_path / "train.jsonl", "w", encoding="utf-8") as file:
        for n in range(48):
            branches = [{"prompt": f" what is {n} + {k}?", "completion": f" {n + k}"} for k in range(3)]
            file.write(json.dumps({"main": f"sums of {n}.", "branches": branches}) + "\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_job_runs_on_a_cluster_without_the_project(cluster, bare_python, tiny_run, workers):
    overrides = [
        f"base_model={tiny_run / 'base'}",
        f"data_path={tiny_run / 'train.jsonl'}",
        f"output_dir={tiny_run / 'runs'}",
        f"mlflow_uri=sqlite:///{tiny_run / 'mlflow.db'}",
        f"num_workers={workers}",
        "max_steps=3",
        "log_every=1",
    ]
    command = [bare_python, "-m", "ray.scripts.scripts", "job", "submit", "--address", cluster, "--working-dir", "."]
    command += ["--runtime-env", "runtime_env.yaml", "--", "python", "-m", "workloads.train", *overrides]
    done = subprocess.run(command, cwd=ROOT, env=_cluster_env(bare_python), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "step 3/3" in done.stdout
    assert len(list((tiny_run / "runs").glob("*/adapter/parallelmind.json"))) == 1


@pytest.mark.slow
def test_a_wrong_field_fails_the_job_with_one_line(cluster, bare_python):
    command = [bare_python, "-m", "ray.scripts.scripts", "job", "submit", "--address", cluster, "--working-dir", "."]
    command += ["--runtime-env", "runtime_env.yaml", "--", "python", "-m", "workloads.train", "data_path=x", "lora_rnk=3"]
    done = subprocess.run(command, cwd=ROOT, env=_cluster_env(bare_python), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "lora_rnk: unknown field (did you mean lora_rank?)" in done.stdout + done.stderr


def _cluster_env(python: Path) -> dict[str, str]:
    """`python` of a job resolves through the PATH of the shell that started the cluster."""
    ours = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    return {**kept, **ours, "PATH": f"{python.parent}:{os.environ['PATH']}"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + STARTUP_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"no cluster at {address} after {STARTUP_S} s")
