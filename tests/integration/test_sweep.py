"""`python -m workloads.sweep` with Ray, MLflow and a tiny model; processes are killed, and its disk fills."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from processes import family
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

pytestmark = [pytest.mark.slow, pytest.mark.full]


@pytest.fixture(scope="module")
def cwd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder)
    return folder


def write_sweep(folder: Path) -> None:
    """A tiny model, data and a sweep of it."""
    save_tiny(folder / "tiny")
    lines = [{"text": f"Question: {i % 5} Answer: the {i % 5} lives", "answer_offset": 4} for i in range(60)]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "sweep.yaml").write_text(SWEEP)


def start(cwd: Path, *arguments: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    env = {
        **os.environ,
        "PYTHONPATH": paths,
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "workloads.sweep", "sweep.yaml", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_output(process: subprocess.Popen[str]) -> str:
    """Wait until the sweep ends with exit code 0; returns its output."""
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def journal_events(cwd: Path) -> list[dict[str, object]]:
    path = next(iter((cwd / "runs").glob("tiny-*/journal.jsonl")), None)
    return [json.loads(line) for line in path.read_text().splitlines()] if path else []


def wait_until(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, while the process runs."""
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_sweep_resumes_and_runs_every_trial_once(cwd: Path) -> None:
    _stop_while_trials_start(cwd)
    process = start(cwd)
    wait_until(process, lambda: any("metrics" in event for event in journal_events(cwd)))
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    output = wait_for_output(start(cwd))
    assert "winner   trial 0" in output
    assert "trials   1 finished, 1 failed" in output
    assert "lora_targets" in output  # the reason of the failure
    folder = next((cwd / "runs").glob("tiny-*"))
    journal = Journal.open(RemotePath(folder / "journal.jsonl"))
    counts = Counter((event["trial"], event["step"]) for event in journal_events(cwd) if "metrics" in event)
    assert set(counts.values()) == {1}
    assert Counter(event["trial"] for event in journal_events(cwd) if "status" in event) == {0: 1, 1: 1}
    _check_tracking(cwd, journal)
    assert (folder / "report.html").read_text().count("<html")
    before = journal_events(cwd)
    output = wait_for_output(start(cwd))
    assert "winner   trial 0" in output
    repeated = {event.get("trial") for event in journal_events(cwd)[len(before) :]}
    assert repeated == {1}  # the failed trial alone
    assert "1 finished, 1 failed" in output


def _stop_while_trials_start(cwd: Path) -> None:
    """Stop the sweep before a trial has a process that can receive the request to stop."""
    process = start(cwd)
    wait_until(process, lambda: any("settings" in event for event in journal_events(cwd)))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 130, output
    assert "stopped; the same command resumes the sweep" in output
    assert any("folder" in event for event in journal_events(cwd))
    assert not any("status" in event for event in journal_events(cwd))


def _check_tracking(cwd: Path, journal: Journal) -> None:
    """One parent run, one child run per trial, no metric step twice, and the winner in the registry."""
    uri = f"sqlite:///{cwd / 'mlflow.db'}"
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("parallelmind").experiment_id])  # type: ignore[union-attr]
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run not in parents]
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parents[0].info.run_id}
    assert sorted(run.info.status for run in children) == ["FAILED", "FINISHED"]
    winner = journal.trials[0]
    steps = [point.step for point in client.get_metric_history(str(winner.run_id), "validation/loss_1")]
    assert steps == sorted(set(steps))
    version = find_model_version(uri, "models:/parallelmind@champion")
    assert version.version == "1"
    model, _ = load_model_with_lora(
        lora_path=str(Path(str(winner.folder)) / "adapter"), base_model=str(cwd / "tiny")
    )
    assert model is not None


def test_a_trial_that_loses_a_worker_says_so_and_goes_on(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    process = start(tmp_path, "points=[{}]", "train.epochs=10")
    wait_until(process, lambda: any("metrics" in event for event in journal_events(tmp_path)))
    (worker,) = family(process.pid, "ray::RayTrainWorker")
    worker.kill()
    output = wait_for_output(process)
    assert output.count("lost a worker; restarting from the newest checkpoint") == 1, output
    assert "trials   1 finished" in output


def test_a_sweep_on_a_full_disk_ends_in_one_line_and_goes_on_when_there_is_space(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny")
    (tmp_path / "data.jsonl").write_text('{"text": "Question: 1 Answer: one", "answer_offset": 4}\n' * 60)
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace(", {lora_targets: no_such_layer}", ""))
    process = start(tmp_path)
    wait_until(process, lambda: any("folder" in event for event in journal_events(tmp_path)))
    events = journal_events(tmp_path)
    # From now on no file of the driver may grow, as if the disk were full; its children may write.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 2, output
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    assert "journal.jsonl: cannot be written (File too large); free space" in lines[0]
    assert "Traceback" not in output
    assert journal_events(tmp_path)[: len(events)] == events
    output = wait_for_output(start(tmp_path))
    assert "winner   trial 0" in output
    assert "hold no whole event" not in output


def test_a_trial_reads_data_of_its_own_in_many_parts(cwd: Path) -> None:
    """More parts than a process reads by itself are read by Ray Data, in the process of the trial."""
    (cwd / "many").mkdir()
    for number in range(6):
        shutil.copy(cwd / "data.jsonl", cwd / "many" / f"{number}.jsonl")
    arguments = (
        "name=many",
        'points=[{"data_path": "data.jsonl"}, {"data_path": "many"}]',
        "train.max_steps=4",
    )
    output = wait_for_output(start(cwd, *arguments))
    assert "trials   2 finished" in output, output
