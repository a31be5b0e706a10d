"""Metrics of a run reach MLflow and Weights & Biases, later if one of them fails meanwhile, and what it lacks
at the end is listed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow.exceptions import MlflowException

from parallelmind import tracking
from parallelmind.errors import UserError
from parallelmind.remote import RemotePath
from parallelmind.wandb_run import WandbTarget
from workloads.train import run_tracking, tracking_sender
from workloads.train.metrics_file import MetricsFile, histories, read_points
from workloads.train.ray_hooks import RayHooks
from workloads.train.run_dir import RunDir
from workloads.train.run_tracking import RunTracking


class Store:
    """Stands for the tracking store and its `Tracker`."""

    def __init__(self) -> None:
        self.problem: Exception | None = None
        self.seconds = 0.0
        self.logged: list[tuple[int, float]] = []
        self.stored: list[str] = []

    place = "https://wandb.ai/me/tests/runs/run"

    def __call__(self, *target: object) -> Store:
        return self

    def _fail_or_wait(self) -> None:
        time.sleep(self.seconds)
        if self.problem:
            raise self.problem

    def log_metrics(self, metrics: dict[str, float], step: int, time_ms: int) -> None:
        self._fail_or_wait()
        assert abs(time_ms / 1000 - time.time()) < 60
        self.logged.append((step, metrics["loss"]))

    def log_folder(self, folder: Path, name: str) -> None:
        self._fail_or_wait()
        self.stored.append(name)

    def log_file(self, path: Path) -> None:
        self.stored.append(path.name)

    def finish(self, status: str = "FINISHED") -> None:
        self._fail_or_wait()
        self.stored.append(status)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    monkeypatch.setattr(tracking, "Tracker", store)
    monkeypatch.setattr(tracking_sender, "_FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(tracking_sender, "_LAST_RETRY_S", 0.02)
    monkeypatch.setattr(tracking_sender, "_FLUSH_S", 2.0)
    return store


@pytest.fixture
def wandb(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Stands for Weights & Biases, beside MLflow."""
    wandb = Store()
    monkeypatch.setattr(run_tracking, "WandbRun", wandb)
    return wandb


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(RemotePath(tmp_path), "adapter", "")


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


FAILURES = [
    MlflowException("The run a must be in the 'active' state. Current state is deleted."),
    ConnectionError(),
]


@pytest.mark.parametrize("problem", FAILURES)
def test_metrics_of_an_outage_are_sent_when_it_ends(
    store: Store, run_dir: RunDir, problem: Exception
) -> None:
    lines: list[str] = []
    sender = RunTracking(run_dir, "uri", "run", None, lines.append)
    sender.log({"loss": 1.0}, 1)
    wait_for(lambda: store.logged)
    store.problem = problem
    for step in (2, 3, 4):
        sender.log({"loss": float(step)}, step)
    wait_for(lambda: lines)
    store.problem = None
    wait_for(lambda: len(store.logged) == 4)
    sender.finish(run_dir.result.local)
    assert store.logged == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert store.stored == ["adapter", "loss.png", "FINISHED"]
    assert [line.partition(";")[0] for line in lines[1:]] == ["mlflow: answers again"]
    assert "training goes on, and its metrics are kept in" in lines[0]
    assert not run_dir.has_unsent()


@pytest.mark.parametrize("problem", FAILURES)
def test_what_is_missing_at_the_end_is_listed_and_sent_later(
    store: Store, run_dir: RunDir, problem: Exception
) -> None:
    lines: list[str] = []
    store.problem = problem
    sender = RunTracking(run_dir, "uri", "run", None, lines.append)
    for step in (1, 2):
        sender.log({"loss": float(step)}, step)
    sender.finish(run_dir.result.local)
    assert lines[-1].startswith("mlflow: lacks 2 points of metrics, and the adapter (")
    assert json.loads(run_dir.unsent_file("mlflow").local.read_text())["metric_points"] == 2
    store.problem = None
    assert run_dir.has_unsent()
    RunTracking(run_dir, "uri", "run", None, lines.append).finish(run_dir.result.local)
    assert store.logged == [(1, 1.0), (2, 2.0)]
    assert store.stored == ["adapter", "loss.png", "FINISHED"]
    assert not run_dir.has_unsent()


def test_metrics_are_at_the_uri_when_a_checkpoint_is(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed later is resumed on another machine, which has the files at the URI alone."""
    monkeypatch.setattr(ray.train, "report", lambda metrics: None)
    uri = (tmp_path / "there").as_uri()
    run_dir = RunDir(RemotePath(tmp_path / "here", uri), "adapter", "")
    run_dir.path.local.mkdir()
    hooks = RayHooks(run_dir, "uri", "run", is_leader=True)
    for step in (1, 2):
        hooks.log({"loss": float(step)}, step)
    hooks.report({}, 2)
    other = RunDir(RemotePath(tmp_path / "other", uri), "adapter", "")
    assert [point.step for point in read_points(other.metrics_file)] == [1, 2]
    hooks.__exit__(None)


def test_training_does_not_wait_for_a_slow_store(store: Store, run_dir: RunDir) -> None:
    store.seconds = 0.5
    sender = RunTracking(run_dir, "uri", "run", None, print)
    started = time.monotonic()
    for step in range(20):
        sender.log({"loss": 1.0}, step)
    assert time.monotonic() - started < 0.4
    assert len(read_points(run_dir.metrics_file)) == 20
    sender.close("KILLED")


TARGET = WandbTarget("run", "mine-hash", "tests", None, {}, Path(), {})


def test_a_run_in_wandb_has_what_mlflow_has(store: Store, wandb: Store, run_dir: RunDir) -> None:
    lines: list[str] = []
    tracking = RunTracking(run_dir, "uri", "run", TARGET, lines.append)
    for step in (1, 2):
        tracking.log({"loss": float(step)}, step)
    tracking.finish(run_dir.result.local)
    assert wandb.logged == store.logged == [(1, 1.0), (2, 2.0)]
    assert wandb.stored == store.stored == ["adapter", "loss.png", "FINISHED"]
    assert lines == ["wandb: https://wandb.ai/me/tests/runs/run"]


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_run_in_wandb_is_left_with_its_status(
    store: Store, wandb: Store, run_dir: RunDir, status: str
) -> None:
    tracking = RunTracking(run_dir, "uri", "run", TARGET, print)
    tracking.log({"loss": 1.0}, 1)
    tracking.close(status)
    assert wandb.stored == [status]
    assert store.stored == []  # the driver ends that one


def test_wandb_may_fail_while_mlflow_has_all(store: Store, wandb: Store, run_dir: RunDir) -> None:
    lines: list[str] = []
    wandb.problem = ConnectionError("no route to https://me:secret@host")
    tracking = RunTracking(run_dir, "uri", "run", TARGET, lines.append)
    tracking.log({"loss": 1.0}, 1)
    tracking.finish(run_dir.result.local)
    assert store.stored == ["adapter", "loss.png", "FINISHED"]
    assert lines[-1].startswith(
        "wandb: lacks 1 points of metrics, and the adapter (no route to https://me:***@host)"
    )
    assert not run_dir.unsent_file("mlflow").local.exists()
    assert run_dir.has_unsent()
    wandb.problem = None
    RunTracking(run_dir, "uri", "run", TARGET, print).finish(run_dir.result.local)
    assert wandb.logged == [(1, 1.0)]
    assert not run_dir.has_unsent()


@pytest.mark.parametrize(
    "line", ["\0\0\0", '{"step": 1}', '{"step": 1, "time_ms": 2, "metrics": {}, "x": 1}', "[]"]
)
def test_a_whole_line_that_is_no_point_is_told_with_its_place(run_dir: RunDir, line: str) -> None:
    MetricsFile(run_dir.metrics_file).append({"loss": 1.0}, 1)
    with open(run_dir.metrics_file.local, "a") as stream:
        stream.write(f"{line}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: is no line of metrics .*; remove the line"):
        MetricsFile(run_dir.metrics_file)


def test_the_file_holds_every_step_once_also_after_a_kill(run_dir: RunDir) -> None:
    metrics = MetricsFile(run_dir.metrics_file)
    for step in (1, 2, 3):
        metrics.append({"loss": float(step), "norm": float("nan")}, step)
    with open(run_dir.metrics_file.local, "a") as stream:
        stream.write('{"step": 4, "time_')
    resumed = MetricsFile(run_dir.metrics_file)
    for step in (2, 3, 4):
        resumed.append({"loss": 10.0 + step, "validation/loss_1": 1.0}, step)
    values = histories(read_points(run_dir.metrics_file))
    assert values["loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0)]
    assert values["validation/loss_1"] == [(2, 1.0), (3, 1.0), (4, 1.0)]
