"""`python -m workloads.doctor` as a user runs it: real Ray, a real MLflow database, a tiny model."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import clusters
import pytest
import ray
from tiny import save_tiny

from serving.runtime.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["libraries", "model", "gpu", "memory", "disk", "ray", "storage", "nodes", "mlflow", "end to end"]


def run_doctor(cwd: Path, *arguments: str, **settings: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """Run the doctor; returns its exit code and, by check, status and text. It must leave no files behind."""
    tiny = save_tiny(cwd / "tiny")
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    completed = subprocess.run(
        [sys.executable, "-m", "workloads.doctor", f"base_model={tiny}", *arguments],
        cwd=cwd,
        env={
            **inherited,
            "PYTHONPATH": paths,
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            **settings,
        },
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert [
        line for line in completed.stderr.splitlines() if "InvalidAuthToken" not in line
    ] == []  # a log line of Ray itself
    assert [path.name for path in cwd.iterdir()] == ["tiny"]
    lines = completed.stdout.splitlines()
    assert [line[6:16].rstrip() for line in lines] == NAMES
    return completed.returncode, {line[6:16].rstrip(): (line[:4].rstrip(), line[18:]) for line in lines}


@pytest.mark.slow
def test_a_working_machine_passes(tmp_path: Path) -> None:
    code, results = run_doctor(tmp_path)
    assert code == 0, results
    assert {status for status, _ in results.values()} <= {"ok", "warn"}
    assert "1 node" in results["ray"][1]
    assert results["end to end"][1].startswith("trained 3 steps and decoded 2 branches with the adapter, in ")


@pytest.mark.slow
def test_an_unreachable_mlflow_server_fails_alone(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    code, results = run_doctor(tmp_path, f"mlflow_uri={uri}", "end_to_end=false")
    assert code == 1, results
    assert [name for name, (status, _) in results.items() if status == "FAIL"] == ["mlflow"]
    assert results["mlflow"][1].startswith(f"mlflow_uri={uri}: cannot be used (")
    assert results["end to end"] == ("skip", "end_to_end=false")


@pytest.mark.slow
def test_a_cluster_is_joined_only_with_its_token(tmp_path: Path) -> None:
    port, token = free_port(), {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    arguments = f"ray_address=127.0.0.1:{port}", "end_to_end=false"
    with clusters.cluster(Path(sys.executable), gcs_port=port, **token):
        code, results = run_doctor(tmp_path, *arguments, **token)
        assert (code, results["ray"][0], results["nodes"][0]) == (0, "ok", "ok"), results
        assert results["ray"][1].startswith(f"Ray {ray.__version__}, joined 127.0.0.1:{port}: 1 node, 2 CPUs")
        assert results["ray"][1].endswith("token auth on")
        code, results = run_doctor(tmp_path, *arguments, **{**token, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
        assert (code, results["ray"][0], results["nodes"][0]) == (1, "FAIL", "skip"), results
        assert results["ray"][1].startswith(
            f"ray_address=127.0.0.1:{port}: cannot be used (Failed to connect "
        )
        assert "RAY_AUTH_TOKEN" in results["ray"][1]
