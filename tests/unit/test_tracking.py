"""A real MLflow database in a temporary folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from parallelmind.tracking import Tracker, absolute_uri

CONFIG = TrainConfig(data_path="data.jsonl")


def test_a_relative_database_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    for uri in ("sqlite:////var/mlflow.db", "sqlite:///:memory:", "http://127.0.0.1:5000"):
        assert absolute_uri(uri) == uri


def test_a_run_is_kept_and_gone_on_with(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = Tracker.start(uri, "tests", "one", CONFIG)
    tracker.log_metrics({"loss": 1.5, "validation/loss_4": 2.0, "gradient_norm": math.nan}, step=3)
    tracker.set_tags({"bad_lines": 2})
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("w")
    Tracker(uri, tracker.run_id).log_folder(tmp_path / "adapter", "adapter")
    tracker.finish("KILLED")
    assert Tracker.start(uri, "tests", "one", CONFIG, tracker.run_id).run_id == tracker.run_id
    run = MlflowClient(uri).get_run(tracker.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["learning_rate"] == str(CONFIG.learning_rate)
    assert run.data.params.keys() == TrainConfig.model_fields.keys()
    assert run.data.metrics == {"loss": 1.5, "validation/loss_4": 2.0}
    assert run.data.tags["config_hash"] == CONFIG.fingerprint()
    assert run.data.tags["bad_lines"] == "2"
    assert list((tmp_path / "mlartifacts").rglob("adapter/weights"))
    assert capfd.readouterr() == ("", "")


def test_an_unknown_run_id_begins_a_new_run(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert Tracker.start(uri, "tests", "one", CONFIG, "0" * 32).run_id != "0" * 32


@pytest.mark.parametrize("uri", ["sqlite:////proc/nowhere/x.db", "file:///tmp/mlruns", "nonsense://x"])
def test_a_store_that_cannot_be_used_is_a_user_error(uri: str) -> None:
    with pytest.raises(UserError, match="mlflow_uri=") as caught:
        Tracker.start(uri, "tests", "one", CONFIG)
    assert "\n" not in str(caught.value)
