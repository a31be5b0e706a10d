"""Runs in Weights & Biases: what is refused before, and what an offline run holds, also when it resumes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb_files import offline_runs

from parallelmind import wandb_run
from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from parallelmind.ray_env import WANDB_ENV
from parallelmind.remote import RemotePath
from parallelmind.wandb_run import check_wandb, wandb_environment
from workloads.train.run_dir import RunDir
from workloads.train.run_tracking import wandb_target

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment without an API key of wandb."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def refusal() -> str:
    with pytest.raises(UserError) as error:
        check_wandb("tests", is_local=True)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(wandb_run, "find_spec", lambda name: None)
    assert refusal() == "track=wandb: needs wandb; pip install wandb, or drop track"
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb("tests", is_local=False)  # the workers may have it


def test_a_missing_key_and_a_bad_project_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "no API key; run wandb login, or set WANDB_API_KEY or WANDB_MODE=offline" in refusal()
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    check_wandb("tests", is_local=True)
    assert wandb_environment() == {"WANDB_API_KEY": KEY}
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    assert "track=wandb: a/b is no name of a project there; set WANDB_PROJECT" in refusal()


def test_the_key_goes_to_the_workers_and_is_shown_nowhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    config = TrainConfig(data_path="s3://me:secret@bucket/data.jsonl", track="wandb")
    target = wandb_target(
        config, RunDir(RemotePath(tmp_path), "adapter", ""), "a" * 32, tags={"folder": tmp_path}
    )
    assert target is not None
    assert target.environment["WANDB_API_KEY"] == KEY
    assert KEY not in repr(target)
    assert "secret" not in repr(target)
    assert str(UserError(f"the server says: {KEY} is not known")) == "the server says: *** is not known"


def test_the_run_of_a_training_is_the_same_one(tmp_path: Path) -> None:
    """Tracking may change when a run resumes."""
    config = TrainConfig(data_path="data.jsonl")
    assert config.fingerprint() == config.replace(track="wandb").fingerprint()
    assert "track" not in config.dump_without_later_defaults()
    assert wandb_target(config, RunDir(RemotePath(tmp_path), "adapter", ""), "a" * 32) is None


WRITE = """
import sys
from pathlib import Path
from parallelmind.wandb_run import WandbRun, WandbTarget
folder, status = Path(sys.argv[1]), sys.argv[2]
config, environment = {"lora_rank": 4}, {"WANDB_MODE": "offline"}
target = WandbTarget("a" * 32, "mine-hash", "tests", "sweep-hash", config, folder, environment)
run = WandbRun(target)
print(run.place)
for step in range(1, 5):
    run.log_metrics({"loss": 1 / step}, step, 1_700_000_000_000 + step)
    run.log_metrics({"validation/loss_1": 2.0}, step, 1_700_000_000_000 + step)
if status == "FINISHED":
    (folder / "adapter").mkdir()
    (folder / "adapter" / "weights").write_text("w")
    (folder / "loss.png").write_text("p")
    run.log_folder(folder / "adapter", "adapter")
    run.log_file(folder / "loss.png")
run.finish(status)
"""


@pytest.mark.slow
def test_an_offline_run_holds_every_step_and_is_resumed_under_its_id(tmp_path: Path) -> None:
    for status in ("KILLED", "FINISHED"):
        command = [sys.executable, "-c", WRITE, str(tmp_path), status]
        done = subprocess.run(
            command, env={**os.environ, **WANDB_ENV}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"offline; wandb sync {tmp_path}/.wandb/offline-run-")
        time.sleep(1)  # folders are named after the second
    stopped, finished = offline_runs(tmp_path)
    for run in (stopped, finished):
        assert (run.run_id, run.project, run.group) == ("a" * 32, "tests", "sweep-hash")
        assert run.config["lora_rank"] == 4
        assert run.history.keys() == {1, 2, 3, 4}
        assert run.history[2]["loss"] == 0.5
        assert run.history[2]["validation/loss_1"] == 2.0
        assert run.history[2]["_timestamp"] == pytest.approx(1_700_000_000.002, abs=1e-4)
    assert (stopped.exit_code, finished.exit_code) == (255, 0)
    assert finished.artifacts == [("mine-hash-adapter", "model")]
    assert "loss.png" in finished.files
    assert stopped.artifacts == []
