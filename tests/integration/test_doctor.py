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


def doctor(place: Path, *arguments: str, **settings: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit code and, for each check, its mark and what it said. Nothing is left of what was tried."""
    tiny = save_tiny(place / "tiny")
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "workloads.doctor", f"base_model={tiny}", *arguments],
        cwd=place,
        env={**kept, "PYTHONPATH": paths, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", **settings},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert [
        line for line in done.stderr.splitlines() if "InvalidAuthToken" not in line
    ] == []  # Ray itself says that
    assert [path.name for path in place.iterdir()] == ["tiny"]
    lines = done.stdout.splitlines()
    assert [line[6:16].rstrip() for line in lines] == NAMES
    return done.returncode, {line[6:16].rstrip(): (line[:4].rstrip(), line[18:]) for line in lines}


@pytest.mark.slow
def test_a_machine_that_is_fine(tmp_path: Path) -> None:
    code, found = doctor(tmp_path)
    assert code == 0, found
    assert {mark for mark, _ in found.values()} <= {"ok", "warn"}
    assert "1 node" in found["ray"][1]
    assert found["end to end"][1].startswith(
        "3 steps of training, then 2 branches decoded with the adapter, in "
    )


@pytest.mark.slow
def test_without_its_mlflow_server(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    code, found = doctor(tmp_path, f"mlflow_uri={uri}", "end_to_end=false")
    assert code == 1, found
    assert [name for name, (mark, _) in found.items() if mark == "FAIL"] == ["mlflow"]
    assert found["mlflow"][1].startswith(f"mlflow_uri={uri}: cannot be used (")
    assert found["end to end"] == ("skip", "end_to_end=false")


@pytest.mark.slow
def test_a_cluster_is_joined_with_its_token_only(tmp_path: Path) -> None:
    port, token = free_port(), {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    asked = f"ray_address=127.0.0.1:{port}", "end_to_end=false"
    with clusters.cluster(Path(sys.executable), gcs_port=port, **token):
        code, found = doctor(tmp_path, *asked, **token)
        assert (code, found["ray"][0], found["nodes"][0]) == (0, "ok", "ok"), found
        assert found["ray"][1].startswith(
            f"Ray {ray.__version__}, joined 127.0.0.1:{port}, of the same version: 1 node, 2 CPUs"
        )
        assert found["ray"][1].endswith("token auth on")
        code, found = doctor(tmp_path, *asked, **{**token, "RAY_AUTH_TOKEN": secrets.token_hex(32)})
        assert (code, found["ray"][0], found["nodes"][0]) == (1, "FAIL", "skip"), found
        assert found["ray"][1].startswith(f"ray_address=127.0.0.1:{port}: cannot be used (Failed to connect ")
        assert "RAY_AUTH_TOKEN" in found["ray"][1]
