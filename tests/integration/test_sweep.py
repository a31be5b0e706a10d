"""`python -m workloads.sweep` as a user runs it: real Ray, a real MLflow database, a tiny model, and a driver
that is killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from tiny import save_tiny

from parallelmind.model.adapter import load_model_with_lora
from parallelmind.remote import RemotePath
from parallelmind.tracking import find_model_version
from workloads.sweep.journal import Journal

ROOT = Path(__file__).resolve().parents[2]
SWEEP = """
name: tiny
train:
  base_model: tiny
  data_path: data.jsonl
  validation_path: data.jsonl
  validation_branches: [1, 4]
  validate_every: 4
  checkpoint_every: 4
  learning_rate: 0.01
  batch_size: 4
  branches_per_sample: 3
  epochs: 2
  log_every: 2
points: [{rope_2d_ratio: 0.5}, {lora_targets: no_such_layer}]
metrics: [validation/loss_1, validation/branch_tax_4]
max_concurrent: 1
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    save_tiny(folder / "tiny")
    lines = [{"text": f"Question: {i % 5} Answer: the {i % 5} lives", "answer_offset": 4} for i in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


def start(place: Path) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    env = {
        **os.environ,
        "PYTHONPATH": paths,
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "workloads.sweep", "sweep.yaml"]
    return subprocess.Popen(
        command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def end(running: subprocess.Popen[str]) -> str:
    output, _ = running.communicate(timeout=400)
    assert running.returncode == 0, output
    return output


def events(place: Path) -> list[dict[str, object]]:
    path = next(iter((place / "runs").glob("tiny-*/journal.jsonl")), None)
    return [json.loads(line) for line in path.read_text().splitlines()] if path else []


def wait_until(running: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_sweep_goes_on_and_every_trial_is_there_once(place: Path) -> None:
    _stop_while_trials_start(place)
    running = start(place)
    wait_until(running, lambda: any("metrics" in event for event in events(place)))
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    told = end(start(place))
    assert "winner   trial 0" in told
    assert "trials   1 finished, 1 failed" in told
    assert "lora_targets" in told  # why the other one failed
    folder = next((place / "runs").glob("tiny-*"))
    journal = Journal.open(RemotePath(folder / "journal.jsonl"))
    counts = Counter((event["trial"], event["step"]) for event in events(place) if "metrics" in event)
    assert set(counts.values()) == {1}
    assert Counter(event["trial"] for event in events(place) if "status" in event) == {0: 1, 1: 1}
    _check_tracking(place, journal)
    assert (folder / "report.html").read_text().count("<html")
    before = events(place)
    again = end(start(place))
    assert "winner   trial 0" in again
    assert {event.get("trial") for event in events(place)[len(before) :]} == {
        1
    }  # what failed, and that alone
    assert "1 finished, 1 failed" in again


def _stop_while_trials_start(place: Path) -> None:
    """Before there is anybody who could be asked to stop."""
    running = start(place)
    wait_until(running, lambda: any("settings" in event for event in events(place)))
    running.send_signal(signal.SIGINT)
    output, _ = running.communicate(timeout=200)
    assert running.returncode == 130, output
    assert "stopped; the same command resumes the sweep" in output
    assert any("folder" in event for event in events(place))
    assert not any("status" in event for event in events(place))


def _check_tracking(place: Path, journal: Journal) -> None:
    """One parent, a child for each trial, every point of a metric once, and the winner in the registry."""
    uri = f"sqlite:///{place / 'mlflow.db'}"
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("parallelmind").experiment_id])  # type: ignore[union-attr]
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run not in parents]
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert sorted(run.info.status for run in children) == ["FAILED", "FINISHED"]
    best = journal.trials[0]
    steps = [point.step for point in client.get_metric_history(str(best.run_id), "validation/loss_1")]
    assert steps == sorted(set(steps))
    version = find_model_version(uri, "models:/parallelmind@champion")
    assert version.version == "1"
    model, _ = load_model_with_lora(
        lora_path=str(Path(str(best.folder)) / "adapter"), base_model=str(place / "tiny")
    )
    assert model is not None
