"""The end of a run, killed at any point: a named result is also in MLflow, and the same command completes the
rest.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from looping import config, fresh_model
from mlflow.tracking import MlflowClient
from tiny import tiny_tokenizer

from parallelmind.remote import RemotePath
from parallelmind.tracking import Tracker
from parallelmind.training.outcome import Outcome
from workloads.train import worker as train_worker
from workloads.train.run import run_training
from workloads.train.run_dir import RunDir
from workloads.train.run_tracking import RunTracking


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


class EndOfRun:
    """The state of rank 0 at the end of a run in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.config = config(
            output_dir=str(folder / "runs"),
            name="cut",
            data_path=str(folder / "none.jsonl"),
            dtype="float32",
        )
        self.run_dir = RunDir.of(self.config)
        self.uri = f"sqlite:///{folder}/mlflow.db"

    def save_result(self) -> None:
        """As every start of the command does it, with no step left to train."""
        tracker = Tracker.start(self.uri, "tests", "cut", self.config, "key")
        tracking = RunTracking(self.run_dir, self.uri, tracker.run_id, None, print)
        tracking.log({"loss": 1.0}, 1)
        task: Any = SimpleNamespace(
            config=self.config, run_dir=self.run_dir, mlflow_run=tracker.run_id, validation_files=()
        )
        model, outcome = fresh_model(self.config), Outcome(True, 1, {"loss": 1.0})
        hooks: Any = SimpleNamespace(finish=tracking.finish)
        train_worker.save_result(task, model, tiny_tokenizer(), hooks, outcome, is_leader=True)

    @property
    def result_exists(self) -> bool:
        return (self.run_dir.result.local / "parallelmind.json").exists()

    def mlflow_state(self) -> tuple[str, set[str]]:
        """Status and artifacts of the one MLflow run."""
        client = MlflowClient(self.uri)
        (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
        paths = [
            item.path
            for folder in (None, "adapter")
            for item in client.list_artifacts(run.info.run_id, folder)
        ]
        return run.info.status, set(paths)


@pytest.mark.parametrize(
    ("owner", "method", "result_exists"),
    [
        (train_worker, "save_trained", False),
        (Tracker, "log_folder", False),
        (train_worker, "save_loss_plot", False),
        (Tracker, "finish", False),
        (RemotePath, "upload", True),  # the first call after the result has appeared, besides the plot's
    ],
)
def test_a_run_that_is_killed_at_its_end_is_completed_by_the_same_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: Any,
    method: str,
    result_exists: bool,
) -> None:
    end, original = EndOfRun(tmp_path), getattr(owner, method)

    def killed(*args: Any, **kwargs: Any) -> Any:
        if method == "upload" and not kwargs:
            return original(*args)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(owner, method, killed)
        with pytest.raises(Killed):
            end.save_result()
    assert end.result_exists is result_exists
    if not result_exists:
        end.save_result()
    status, artifacts = end.mlflow_state()
    assert end.result_exists
    assert status == "FINISHED"
    assert artifacts >= {"loss.png", "adapter/parallelmind.json", "adapter/adapter_model.safetensors"}
    run_training(end.config)
    assert "already finished" in capsys.readouterr().out
