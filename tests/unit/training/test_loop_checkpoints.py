"""Checkpoints of the loop: damaged, half written, on a full disk, beside the steps that follow."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from looping import Recorder, config, run, same, steps
from safetensors.torch import save_file

from parallelmind.errors import UserError
from parallelmind.remote import RemotePath
from parallelmind.training import checkpoint
from parallelmind.training.checkpoint import CheckpointManager


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "empty", "missing", "half a state", "flipped state", "other settings"]
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    settings = config()
    whole = run(settings, tmp_path)
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
    again = run(settings, tmp_path)
    assert any("step-6" in line and "put aside" in line for line in again.hooks.lines)
    assert min(again.hooks.metrics) == 5  # from step 4 on
    same(again.weights, whole.weights)
    assert (tmp_path / "damaged-step-6").is_dir()


def test_what_a_killed_writer_left_behind_is_no_checkpoint(tmp_path: Path) -> None:
    settings = config()
    run(settings, tmp_path, Recorder(stop_at=2))
    with pytest.MonkeyPatch.context() as patch_:
        patch_.setattr(checkpoint, "asdict", lambda state: os._exit(9))
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
    before = steps(tmp_path)
    with pytest.MonkeyPatch.context() as patch_:
        patch_.setattr(checkpoint, "save_file", full)
        with pytest.raises(
            UserError, match=r"output_dir: .*No space left on device; whole ones: step-2, step-3\); make room"
        ):
            run(settings, tmp_path)
    assert steps(tmp_path) == before
    assert run(settings, tmp_path).outcome.finished


def test_a_checkpoint_is_written_beside_the_steps_that_follow(tmp_path: Path) -> None:
    """A disk that never ends its work holds up the second save, not the steps before it."""
    settings = config(checkpoint_every=2)
    release, began = threading.Event(), threading.Event()
    hooks = Recorder()

    def slow(*args: object) -> None:
        began.set()
        assert release.wait(60)
        save_file(*args)

    log = hooks.log

    def logged(metrics: Mapping[str, float], step: int) -> None:
        log(metrics, step)
        if step == 3:
            assert began.wait(60)
            release.set()

    hooks.log = logged  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch_:
        patch_.setattr(checkpoint, "save_file", slow)
        assert run(settings, tmp_path, hooks).outcome.finished
    assert steps(tmp_path) == ["step-4", "step-6"]


def test_a_machine_that_was_here_before_goes_on_with_what_is_at_the_uri(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own copy has the same step, as after a run that was removed there and begun anew by another
    machine.
    """
    uri = f"memory://{uuid4().hex}"
    for machine in ("old", "new"):
        monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / machine))
        store = CheckpointManager(RemotePath.at(uri), keep=2)
        store.save(
            checkpoint.Snapshot({"a": torch.zeros(1)}, {}, checkpoint.State("hash", run_id=machine, step=5))
        )
        store.close()
    monkeypatch.setenv("PARALLELMIND_CACHE", str(tmp_path / "old"))
    store = CheckpointManager(RemotePath.at(uri), keep=2)
    found = store.resume("hash", print)
    store.close()
    assert found is not None
    assert checkpoint.read(found).state.run_id == "new"
