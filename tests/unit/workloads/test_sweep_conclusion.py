"""The end of a sweep whose tracking store has failed: what it lacks is sent, then the winner registered."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from parallelmind.config import resolve
from parallelmind.errors import UserError
from parallelmind.remote import RemotePath
from workloads.sweep import conclusion
from workloads.sweep.config import SweepConfig
from workloads.sweep.journal import Journal
from workloads.sweep.trainable import SweepContext
from workloads.train.run_dir import RunDir


@pytest.fixture
def ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A sweep whose only trial has finished, and whose adapter MLflow lacks. `calls`: of the store."""
    config = resolve(
        SweepConfig,
        {
            "train": {"data_path": "d"},
            "points": [{"lora_rank": 4}],
            "metrics": ["loss"],
            "register_as": "mine",
        },
    )
    context = SweepContext(config, RemotePath(tmp_path / "sweep"), "parent", 1)
    run_dir = RunDir.of(context.trial_config(0, {"lora_rank": 4, "seed": 0}))
    run_dir.path.local.mkdir(parents=True)
    run_dir.unsent_file("mlflow").local.write_text("{}")
    journal = Journal.open(RemotePath(tmp_path / "journal.jsonl"))
    journal.add_trial(0, {"lora_rank": 4, "seed": 0})
    journal.set_location(0, run_dir.path.location, "run")
    journal.add_report(0, 2, {"loss": 1.0}, "finished")
    calls: list[str] = []

    def register(*arguments: str) -> str:
        calls.append("register")
        return "1"

    monkeypatch.setattr(conclusion, "_publish_report", lambda *arguments: None)
    monkeypatch.setattr(conclusion, "_log_winner", lambda *arguments: None)
    monkeypatch.setattr(conclusion, "register_model", register)
    tracker = SimpleNamespace(uri="sqlite:///mlflow.db", run_id="parent")
    return SimpleNamespace(
        run_dir=run_dir,
        calls=calls,
        conclude=lambda: conclusion.conclude(context, journal, tracker, True),  # type: ignore[arg-type]
    )


def test_what_the_store_lacks_is_sent_before_the_winner_is_registered(
    ended: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def send(config: object, run_dir: RunDir, group: str) -> None:
        assert (run_dir, group) == (ended.run_dir, "sweep")
        ended.calls.append("send")
        run_dir.unsent_file("mlflow").local.unlink()

    monkeypatch.setattr(conclusion, "send_missing", send)
    ended.conclude()
    assert ended.calls == ["send", "register"]


def test_a_winner_that_the_store_lacks_is_not_registered(
    ended: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conclusion, "send_missing", lambda *arguments: None)
    with pytest.raises(UserError, match=r"^register_as=mine: .*\(it lacks the adapter\); the same command"):
        ended.conclude()
    assert ended.calls == []
    assert "trials   1 finished" in capsys.readouterr().out


def test_a_registry_that_fails_is_told_in_one_line_after_the_results(
    ended: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: str) -> str:
        raise MlflowException("no answer")

    ended.run_dir.unsent_file("mlflow").local.unlink()
    monkeypatch.setattr(conclusion, "register_model", fail)
    with pytest.raises(UserError, match=r"^register_as=mine: .*\(no answer\); the same command"):
        ended.conclude()
    assert "winner   trial 0" in capsys.readouterr().out
