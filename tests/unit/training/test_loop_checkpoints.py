"""Checkpoints: damaged, partly written, on a full disk, written in the background, of an earlier version."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from looping import Recorder, assert_same_weights, checkpoint_steps, config, run
from safetensors.torch import save_file

from parallelmind.errors import UserError
from parallelmind.remote import RemotePath
from parallelmind.training import checkpoint
from parallelmind.training.checkpoint import TrainingState
from parallelmind.training.checkpoint_manager import CheckpointManager
from parallelmind.training.step import Totals


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "empty", "missing", "half a state", "flipped state", "other settings"]
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    settings = config()
    undisturbed = run(settings, tmp_path)
    newest = tmp_path / "step-6"
    target = newest / ("state.json" if "state" in damage else "optimizer.safetensors")
    data = target.read_bytes()
    if damage == "other settings":
        state = checkpoint.read_state(newest)
        assert state is not None
        state.config_hash = "0" * 12
        other = CheckpointManager(RemotePath(tmp_path), 2)
        other.save(checkpoint.Snapshot({}, {}, state))
        other.close()
    elif damage == "missing":
        target.unlink()
    elif "flipped" in damage:
        middle = data.index(b'"step": 6') + 8 if "state" in damage else len(data) // 2
        target.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        target.write_bytes(data[: 0 if damage == "empty" else len(data) // 2])
    resumed = run(settings, tmp_path)
    assert any("step-6" in line and "renamed to damaged-step-6" in line for line in resumed.hooks.lines)
    assert min(resumed.hooks.metrics) == 5  # from step 4 on
    assert_same_weights(resumed.weights, undisturbed.weights)
    assert (tmp_path / "damaged-step-6").is_dir()


def test_a_partly_written_checkpoint_of_a_killed_writer_is_ignored(tmp_path: Path) -> None:
    settings = config()
    run(settings, tmp_path, Recorder(stop_at=2))
    with pytest.MonkeyPatch.context() as patch_:
        patch_.setattr(checkpoint, "_to_json", lambda state: os._exit(9))
        child = os.fork()
        if child == 0:
            run(settings, tmp_path)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".step-")]
    assert run(settings, tmp_path).outcome.finished
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".step-")]


def test_a_full_disk_is_one_line_and_leaves_earlier_checkpoints(tmp_path: Path) -> None:
    settings = config(epochs=3)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run(settings, tmp_path, Recorder(stop_at=3))
    before = checkpoint_steps(tmp_path)
    with pytest.MonkeyPatch.context() as patch_:
        patch_.setattr(checkpoint, "save_file", full)
        with pytest.raises(
            UserError,
            match=r"output_dir: .*No space left on device; complete ones: step-2, step-3\); make room",
        ):
            run(settings, tmp_path)
    assert checkpoint_steps(tmp_path) == before
    assert run(settings, tmp_path).outcome.finished


def test_a_checkpoint_is_written_in_the_background(tmp_path: Path) -> None:
    """A slow disk blocks the second save, not the steps before it."""
    settings = config(checkpoint_every=2)
    release, started = threading.Event(), threading.Event()
    hooks = Recorder()

    def slow(*args: object) -> None:
        started.set()
        assert release.wait(60)
        save_file(*args)

    log = hooks.log

    def logged(metrics: Mapping[str, float], step: int) -> None:
        log(metrics, step)
        if step == 3:
            assert started.wait(60)
            release.set()

    hooks.log = logged  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch_:
        patch_.setattr(checkpoint, "save_file", slow)
        assert run(settings, tmp_path, hooks).outcome.finished
    assert checkpoint_steps(tmp_path) == ["step-4", "step-6"]


def test_a_machine_with_an_old_copy_resumes_from_the_checkpoint_at_the_uri(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy has the same step: the run was removed at the URI and started again by another machine."""
    uri = f"memory://{uuid4().hex}"
    for machine in ("old", "new"):
        monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / machine))
        manager = CheckpointManager(RemotePath.at(uri), keep=2)
        manager.save(
            checkpoint.Snapshot({"a": torch.zeros(1)}, {}, TrainingState("hash", run_id=machine, step=5))
        )
        manager.close()
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "old"))
    manager = CheckpointManager(RemotePath.at(uri), keep=2)
    newest = manager.resume("hash", print)
    manager.close()
    assert newest is not None
    state = checkpoint.read_state(newest)
    assert state is not None
    assert state.run_id == "new"


def test_the_keys_of_state_json_are_those_of_every_earlier_version(tmp_path: Path) -> None:
    state = TrainingState(
        config_hash="hash",
        run_id="run",
        step=5,
        epoch=1,
        batches=3,
        batches_per_epoch=7,
        skipped_steps=2,
        bad_steps=1,
        branches=40,
        loss_scale=2.0,
        clean_steps=9,
        best_loss=0.5,
        best_step=4,
        window=Totals(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0),
        metrics={"loss": 0.25},
    )
    folder = tmp_path / "step-5"
    checkpoint.write_checkpoint(checkpoint.Snapshot({}, {}, state), folder)
    content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    assert json.dumps(content["state"]) == (
        '{"config_hash": "hash", "run_id": "run", "step": 5, "epoch": 1, "batches": 3, "per_epoch": 7, '
        '"skipped": 2, "bad": 1, "branches": 40, "scale": 2.0, "clean": 9, "best": 0.5, "best_step": 4, '
        '"window": {"loss": 1.0, "targets": 2.0, "tokens": 3.0, "places": 4.0, "branches": 5.0, '
        '"batches": 6.0, "stop": 0.0}, "metrics": {"loss": 0.25}}'
    )
    assert checkpoint.read_state(folder) == state
