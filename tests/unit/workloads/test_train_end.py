"""The end of a run, cut short anywhere: what has its name is in MLflow too, and the same command does the
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
from workloads.train.command import run_training


class Killed(BaseException):
    """In place of SIGKILL: nothing that follows is done."""


class End:
    """What the leading worker has at the end of a run in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.config = config(
            output_dir=str(folder / "runs"), name="cut", data_path=str(folder / "none.jsonl")
        )
        self.place = RemotePath(Path(self.config.run.output_dir) / f"cut-{self.config.fingerprint()[:8]}")
        self.uri = f"sqlite:///{folder}/mlflow.db"

    def reach(self) -> None:
        """As every start of the command does it, with no step left to take."""
        tracker = Tracker.start(self.uri, "tests", "cut", self.config, "key")
        tracker.log_metrics({"loss": 1.0}, 1)
        task: Any = SimpleNamespace(config=self.config, place=self.place, mlflow_run=tracker.run_id)
        hooks: Any = SimpleNamespace(tracker=tracker)
        train_worker.keep(
            task, fresh_model(self.config), tiny_tokenizer(), hooks, Outcome(True, 1, {"loss": 1.0})
        )

    @property
    def named(self) -> bool:
        return (self.place.local / "adapter" / "parallelmind.json").exists()

    def tracked(self) -> tuple[str, set[str]]:
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
    ("owner", "step", "named"),
    [
        (train_worker, "save_trained", False),
        (Tracker, "log_folder", False),
        (train_worker, "keep_losses", False),
        (Tracker, "finish", False),
        (
            RemotePath,
            "upload",
            True,
        ),  # the first thing after the name has appeared, beside that of the picture
    ],
)
def test_a_run_that_is_killed_at_its_end_is_whole_after_the_same_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: Any,
    step: str,
    named: bool,
) -> None:
    end, done = End(tmp_path), getattr(owner, step)

    def cut(*args: Any, **kwargs: Any) -> Any:
        if step == "upload" and not kwargs:
            return done(*args)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(owner, step, cut)
        with pytest.raises(Killed):
            end.reach()
    assert end.named is named
    if not named:
        end.reach()
    status, artifacts = end.tracked()
    assert end.named
    assert status == "FINISHED"
    assert artifacts >= {"loss.png", "adapter/parallelmind.json", "adapter/adapter_model.safetensors"}
    run_training(end.config)
    assert "finished before" in capsys.readouterr().out
