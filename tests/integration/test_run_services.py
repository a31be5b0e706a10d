"""A run that is tracked in Weights & Biases and uploaded to the hub: interrupted, resumed, uploaded again."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub, fake_hub
from runs import prepare
from wandb_files import offline_runs

ROOT = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"
SETTINGS = {
    "learning_rate": 0.01,
    "batch_size": 4,
    "branches_per_sample": 3,
    "epochs": 2,
    "log_every": 1,
    "track": "wandb",
    "push_to": "me/mine",
    "name": "mine",
}


def start(folder: Path, hub: FakeHub, *command: str) -> subprocess.Popen[str]:
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]),
        "RAY_AUTH_MODE": "disabled",
        "PYTHONUNBUFFERED": "1",
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": KEY,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": next(iter(hub.tokens)),
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_run_is_tracked_in_wandb_and_uploaded_also_after_failures(tmp_path: Path) -> None:
    prepare(tmp_path, 60, SETTINGS)
    with fake_hub() as hub:
        hub.refuses = True
        train = ("-m", "workloads.train", "run.yaml")
        running = start(tmp_path, hub, *train)
        assert running.stdout is not None
        first: list[str] = []
        for line in running.stdout:
            first.append(line)
            if line.startswith("step 3/"):
                running.send_signal(signal.SIGINT)
                break
        first.append(running.communicate(timeout=400)[0])
        assert running.returncode == 130, first
        resumed = start(tmp_path, hub, *train)
        second, _ = resumed.communicate(timeout=400)
        assert resumed.returncode == 2, second
        error = second.splitlines()[-1]
        assert error.startswith("error: push_to=me/mine: the upload failed (")
        command = re.search(r"python (-m workloads\.push .*) repeats the upload$", error)
        assert command is not None
        hub.refuses = False
        repeated = start(tmp_path, hub, *shlex.split(command[1]))
        third, _ = repeated.communicate(timeout=100)
        assert repeated.returncode == 0, third
        (folder,) = (tmp_path / "runs").glob("mine-*")
        adapter = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
        assert hub.repos == {"me/mine": adapter}
    check_wandb_runs(folder)
    check_key_is_nowhere(folder, "".join([*first, second, third]))


def check_wandb_runs(folder: Path) -> None:
    """Both runs have the id of the MLflow run, and the resumed one has every point."""
    stopped, finished = offline_runs(folder)
    manifest = json.loads((folder / "adapter" / "parallelmind.json").read_text())
    assert stopped.run_id == finished.run_id == manifest["extra"]["mlflow_run"]
    assert stopped.project == "parallelmind"
    assert finished.config["learning_rate"] == 0.01
    assert "version.torch" in finished.config
    assert (stopped.exit_code, finished.exit_code) == (255, 0)
    assert finished.artifacts == [(f"{folder.name}-adapter", "model")]
    assert "loss.png" in finished.files
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(points) > 5
    for point in points:
        logged = finished.history[point["step"]]
        assert {name: logged[name] for name in point["metrics"]} == pytest.approx(point["metrics"])
    assert set(stopped.history) < set(finished.history)


def check_key_is_nowhere(folder: Path, output: str) -> None:
    assert KEY not in output
    for path in folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
