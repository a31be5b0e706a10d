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
    # Ray itself logs a wrong token.
    assert [line for line in completed.stderr.splitlines() if "InvalidAuthToken" not in line] == []
    assert [path.name for path in cwd.iterdir()] == ["tiny"]
    lines = completed.stdout.splitlines()
    assert [line[6:16].rstrip() for line in lines] == NAMES
    return completed.returncode, {line[6:16].rstrip(): (line[:4].rstrip(), line[18:]) for line in lines}


@pytest.mark.full
@pytest.mark.slow
def test_a_working_machine_passes(tmp_path: Path) -> None:
    code, results = run_doctor(tmp_path)
    assert code == 0, results
    assert {status for status, _ in results.values()} <= {"ok", "warn"}
    assert "1 node" in results["ray"][1]
    assert results["end to end"][1].startswith("trained 3 steps and decoded 2 branches with the adapter, in ")


@pytest.mark.full
@pytest.mark.slow
def test_a_cluster_is_joined_only_with_its_token_and_independent_failures_are_all_reported(
    tmp_path: Path,
) -> None:
    port, token = free_port(), {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    address, mlflow_uri = f"127.0.0.1:{port}", f"http://127.0.0.1:{free_port()}"
    arguments = f"ray_address={address}", "end_to_end=false"
    with clusters.cluster(Path(sys.executable), gcs_port=port, **token):
        code, results = run_doctor(tmp_path, *arguments, **token)
        assert code == 0, results
        assert (results["ray"][0], results["nodes"][0]) == ("ok", "ok"), results
        assert results["ray"][1].startswith(f"Ray {ray.__version__}, joined {address}: 1 node, 2 CPUs")
        assert results["ray"][1].endswith("token auth on")
        assert results["end to end"] == ("skip", "end_to_end=false")
        wrong_token = {**token, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        code, results = run_doctor(tmp_path, *arguments, f"mlflow_uri={mlflow_uri}", **wrong_token)
    assert code == 1, results
    assert failed_checks(results) == ["ray", "mlflow"]
    assert results["nodes"] == ("skip", "needs ray")
    assert results["ray"][1].startswith(f"ray_address={address}: cannot be used (Failed to connect ")
    assert "RAY_AUTH_TOKEN" in results["ray"][1]
    assert results["mlflow"][1].startswith(f"mlflow_uri={mlflow_uri}: cannot be used (")


def failed_checks(results: dict[str, tuple[str, str]]) -> list[str]:
    return [name for name, (status, _) in results.items() if status == "FAIL"]
