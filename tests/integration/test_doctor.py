"""`python -m workloads.doctor` as a user runs it: real Ray, a real MLflow database, a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny

from serving.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["libraries", "model", "gpu", "memory", "disk", "ray", "storage", "nodes", "mlflow", "end to end"]


def doctor(place: Path, *arguments: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit code and, for each check, its mark and what it said. Nothing is left of what was tried."""
    tiny = save_tiny(place / "tiny")
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "workloads.doctor", f"base_model={tiny}", *arguments],
        cwd=place,
        env={**kept, "PYTHONPATH": paths, "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.stderr == ""
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
    assert found["end to end"][1].startswith("3 steps of training, then 2 branches decoded with the adapter, in ")


@pytest.mark.slow
def test_without_its_mlflow_server(tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    code, found = doctor(tmp_path, f"mlflow_uri={uri}", "end_to_end=false")
    assert code == 1, found
    assert [name for name, (mark, _) in found.items() if mark == "FAIL"] == ["mlflow"]
    assert found["mlflow"][1].startswith(f"mlflow_uri={uri}: cannot be used (")
    assert found["end to end"] == ("skip", "end_to_end=false")
