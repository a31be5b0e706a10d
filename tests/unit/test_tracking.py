"""Tracking and registry against a real MLflow database in a temporary folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from parallelmind import tracking
from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from parallelmind.tracking import Tracker, absolute_uri

CONFIG = TrainConfig(data_path="data.jsonl")


def test_a_relative_database_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    for uri in ("sqlite:////var/mlflow.db", "sqlite:///:memory:", "http://127.0.0.1:5000"):
        assert absolute_uri(uri) == uri


def test_a_run_is_stored_and_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker.start(uri, "tests", "one", CONFIG, "key")
    tracker.log_metrics({"loss": 1.5, "validation/loss_4": 2.0, "gradient_norm": math.nan}, step=3)
    tracker.set_tags({"bad_lines": 2})
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("w")
    Tracker(uri, tracker.run_id).log_folder(tmp_path / "adapter", "adapter")
    tracker.finish("KILLED")
    resumed_config = CONFIG.replace(num_workers=4)
    assert Tracker.start(uri, "tests", "one", resumed_config, "key").run_id == tracker.run_id
    run = MlflowClient(uri).get_run(tracker.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["learning_rate"] == str(CONFIG.optimizer.learning_rate)
    assert run.data.params.keys() == TrainConfig.flat_fields().keys()
    assert run.data.metrics == {"loss": 1.5, "validation/loss_4": 2.0}
    assert run.data.tags["config_hash"] == CONFIG.fingerprint()
    assert run.data.tags["bad_lines"] == "2"
    assert list((tmp_path / "mlartifacts").rglob("adapter/weights"))
    assert capfd.readouterr() == ("", "")


def test_a_run_whose_creation_was_interrupted_is_found_by_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is killed after the run was created and before its parameters were logged."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_log_params", killed)
        with pytest.raises(KeyboardInterrupt):
            Tracker.start(uri, "tests", "one", CONFIG, "key")
    tracker = Tracker.start(uri, "tests", "one", CONFIG, "key")
    assert Tracker.start(uri, "tests", "one", CONFIG, "other").run_id != tracker.run_id
    client = MlflowClient(uri)
    assert len(client.search_runs([client.get_run(tracker.run_id).info.experiment_id])) == 2
    assert client.get_run(tracker.run_id).data.params["seed"] == "0"


def test_repeated_steps_are_logged_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker.start(uri, "tests", "one", CONFIG, "key")
    for step in (1, 2, 3):
        tracker.log_metrics({"loss": float(step)}, step)
    resumed = Tracker(uri, tracker.run_id)
    for step in (2, 3, 4):
        resumed.log_metrics({"loss": 10.0 + step, "validation/loss_1": 1.0}, step)
        resumed.log_metrics({"loss": 20.0}, step)
    assert resumed.metric_history("loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 14.0)]
    assert [step for step, _ in resumed.metric_history("validation/loss_1")] == [2, 3, 4]
    assert resumed.metric_names() == ["loss", "validation/loss_1"]


@pytest.mark.parametrize(
    "uri", ["sqlite:////proc/nowhere/x.db", "file:///tmp/mlruns", "nonsense://x", "postgresql://h:port/x"]
)
def test_an_unusable_store_is_a_user_error(uri: str) -> None:
    with pytest.raises(UserError, match="mlflow_uri=") as caught:
        Tracker.start(uri, "tests", "one", CONFIG, "key")
    assert "\n" not in str(caught.value)


def test_an_artifact_store_that_refuses_is_a_user_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The errors of its library are no errors of MLflow, as those of botocore."""

    class NoCredentialsError(Exception):
        pass

    def refuse(*_: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    tracker = Tracker.start(f"sqlite:///{tmp_path}/mlflow.db", "tests", "one", CONFIG, "key")
    expected = r"refuses: Unable to locate credentials\); give this process access"
    with pytest.raises(UserError, match=expected), tracking.store_errors(tracker.uri):
        tracker.log_file(tmp_path / "config.yaml")
    with tracking.go_on_without_store("the plot"):
        tracker.log_file(tmp_path / "loss.png")
    assert capfd.readouterr().err == (
        "mlflow: lacks the plot (its artifact store refuses: Unable to locate credentials)\n"
    )


def test_a_finished_run_keeps_its_end_time(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker.start(uri, "tests", "one", CONFIG, "key")
    tracker.finish("FAILED")
    end_time = MlflowClient(uri).get_run(tracker.run_id).info.end_time
    tracker.finish("FAILED")
    assert MlflowClient(uri).get_run(tracker.run_id).info.end_time == end_time
    tracker.finish()
    assert MlflowClient(uri).get_run(tracker.run_id).info.status == "FINISHED"


def test_a_run_is_registered_once_and_an_invalid_name_is_an_error(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_id = Tracker.start(uri, "tests", "one", CONFIG, "key").run_id
    versions = [
        tracking.register_model(uri, run_id, "adapter", "mine", alias) for alias in ("champion", "other")
    ]
    assert versions == ["1", "1"]
    with pytest.raises(MlflowException, match="Invalid model name"):
        tracking.register_model(uri, run_id, "adapter", "org/mine", "champion")
