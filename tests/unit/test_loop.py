"""The loop without Ray: it learns, stops, resumes as if undisturbed, and leaves out steps that are not finite."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import tiny_llama

from parallelmind.config import LoraConfig, RopeConfig, TrainConfig
from parallelmind.data.grouping import Row, Seeds, groups, make_batch, regrouped
from parallelmind.errors import UserError
from parallelmind.layout import Batch, Tokens
from parallelmind.mirror import Mirror
from parallelmind.model import attention
from parallelmind.model.adapter import add_lora
from parallelmind.model.patch import patch
from parallelmind.training import checkpoint, loop
from parallelmind.training.checkpoint import Store
from parallelmind.training.loop import Job, Outcome, train
from parallelmind.training.step import learning_rate

ROWS = [Row(Tokens.of([], [[5 + i % 7, 20, 30 + i % 3, 40, 2]]), lone=True) for i in range(36)]


def config(**settings: object) -> TrainConfig:
    values: dict[str, object] = {
        "data_path": "-",
        "epochs": 2,
        "batch_size": 3,
        "branches_per_sample": 2,
        "accumulation_steps": 2,
        "learning_rate": 0.01,
        "lora_rank": 4,
        "lora_dropout": 0.1,
        "checkpoint_every": 2,
        "log_every": 1,
        "validate_every": 3,
        "validation_branches": [1, 4],
    }
    return TrainConfig.model_validate(values | settings)


class Run(NamedTuple):
    outcome: Outcome
    hooks: Recorder
    weights: dict[str, torch.Tensor]


class Recorder:
    """Hooks that keep what they are told; ask to stop from the poll named on."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.polled = stop_at, 0
        self.lines: list[str] = []
        self.metrics: dict[int, dict[str, float]] = {}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics[step] = self.metrics.get(step, {}) | dict(metrics)

    def say(self, line: str) -> None:
        self.lines.append(line)

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def should_stop(self) -> bool:
        self.polled += 1
        return self.stop_at is not None and self.polled >= self.stop_at


def fresh_model(settings: TrainConfig) -> PeftModel:
    model = tiny_llama()
    patch(model, settings.part(RopeConfig))
    return add_lora(model, settings.part(LoraConfig), seed=0)


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}


def job(settings: TrainConfig, hooks: Recorder, model: PeftModel | None = None, store: Store | None = None) -> Job:
    rope = settings.part(RopeConfig)

    def stream(epoch: int, first: int) -> Iterator[Batch]:
        for group in islice(groups(ROWS, settings, Seeds(settings.seed, epoch)), first, None):
            yield group.batch(rope, 0)

    validation = {n: [make_batch(regrouped(ROWS, n, 8, settings), rope, 0)] for n in settings.validation_branches}
    return Job(settings, model or fresh_model(settings), stream, hooks, per_epoch=6, validation=validation, store=store)


def run(settings: TrainConfig, folder: Path, hooks: Recorder | None = None, model: PeftModel | None = None) -> Run:
    """Train with a store in `folder`, from its newest checkpoint if there is one."""
    hooks = hooks or Recorder()
    store = Store(Mirror(folder), settings.keep_checkpoints)
    work = job(settings, hooks, model, store)
    try:
        return Run(train(work, store.resume(settings.fingerprint(), hooks.say)), hooks, weights(work.model))
    finally:
        store.close()


def logged(run: Run) -> dict[tuple[int, str], float]:
    """Every metric that is not a matter of the clock or the machine, by step and name."""
    own = ("tokens_per_second", "peak_memory_gib", "seconds")
    return {(step, name): value for step, found in run.hooks.metrics.items() for name, value in found.items() if name not in own}


def steps(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.by_step(folder)]


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_loss_falls_and_lines_and_metrics_are_told(tmp_path: Path) -> None:
    outcome, hooks, _ = run(config(), tmp_path)
    assert outcome.finished
    assert outcome.step == 6
    assert hooks.metrics[6]["loss"] < hooks.metrics[1]["loss"]
    assert hooks.metrics[6]["validation/branch_tax_4"] == pytest.approx(
        hooks.metrics[6]["validation/loss_4"] - hooks.metrics[6]["validation/loss_1"]
    )
    assert hooks.metrics[6]["peak_memory_gib"] > 0
    assert hooks.lines[0] == "attention: sdpa for up to 16 tokens"
    assert hooks.lines[1].startswith("step 1/6  loss ")
    assert "tok/s  ETA" in hooks.lines[1]


def test_attention_is_told_once_for_all_shorter_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attention_for", lambda _, limit, __: "flex_attention" if limit > 256 else "sdpa")
    lines: list[str] = []
    say = attention.Announcer(tiny_llama(), torch.float32, lines.append)
    batches: list[Any] = [SimpleNamespace(ids=np.zeros((1, length))) for length in (64, 32, 512, 16, 256, 100, 300)]
    assert list(say(batches)) == batches
    assert lines == [
        "attention: sdpa for up to 64 tokens",
        "attention: flex_attention for up to 512 tokens",
        "attention: sdpa for up to 256 tokens",
    ]


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize(("poll", "step"), [(1, 1), (3, 3), (4, 3), (5, 4)])  # the fourth comes at the end of an epoch
def test_resume_equals_the_undisturbed_run(tmp_path: Path, poll: int, step: int, log_every: int) -> None:
    settings = config(log_every=log_every)
    whole = run(settings, tmp_path / "whole")
    cut = run(settings, tmp_path / "cut", Recorder(poll))
    assert (cut.outcome.finished, cut.outcome.step) == (False, step)
    again = run(settings, tmp_path / "cut")
    assert again.outcome.metrics["loss"] == whole.outcome.metrics["loss"]
    assert logged(cut) | logged(again) == logged(whole)
    same(again.weights, whole.weights)


def test_every_checkpoint_leads_to_the_same_end(tmp_path: Path) -> None:
    """Also from one that is older than the newest, as after damage: the logged losses are the same once more."""
    settings = config(keep_checkpoints=10)
    whole = run(settings, tmp_path)
    for name in steps(tmp_path)[:-1]:
        other = tmp_path / f"from-{name}"
        shutil.copytree(tmp_path / name, other / name)
        again = run(settings, other)
        same(again.weights, whole.weights)
        assert logged(again).items() <= logged(whole).items()


def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path: Path) -> None:
    """The learning rate is absurd after a good start, so the best validation is an early one."""
    settings = config(epochs=4, schedule="constant", warmup_ratio=0.0, learning_rate=0.02, validate_every=1, keep_checkpoints=1)
    losses = iter([3.0, 2.0, *[5.0] * 20])
    with pytest.MonkeyPatch.context() as patch_:
        patch_.setattr(loop, "validate_at", lambda *_: {"validation/loss_1": next(losses)})
        outcome = run(settings, tmp_path).outcome
    assert steps(tmp_path) == ["step-2", f"step-{outcome.step}"]
    state = checkpoint.read_state(tmp_path / f"step-{outcome.step}")
    assert state is not None
    assert (state.best, state.best_step) == (2.0, 2)


def test_max_steps_ends_the_run(tmp_path: Path) -> None:
    outcome = train(job(config(max_steps=2), Recorder()))
    assert (outcome.finished, outcome.step) == (True, 2)


def spoiled(settings: TrainConfig, calls: int) -> PeftModel:
    """A model whose first so many logits are not finite."""
    model = fresh_model(settings)
    numbers = iter(range(1000))
    head = model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: output * (float("nan") if next(numbers) < calls else 1.0))
    return model


def test_a_step_without_a_finite_loss_is_left_out_and_counted(tmp_path: Path) -> None:
    settings = config(epochs=1)
    outcome, hooks, found = run(settings, tmp_path, model=spoiled(settings, 2))
    assert outcome.metrics["skipped_steps"] == 1
    assert np.isfinite(outcome.metrics["loss"])
    assert all(value.isfinite().all() for value in found.values())
    assert any("step left out" in line for line in hooks.lines)


def test_too_many_bad_steps_in_a_row_end_the_run_and_name_the_last_good_checkpoint(tmp_path: Path) -> None:
    settings = config(epochs=9, max_bad_steps=3)
    run(settings, tmp_path, Recorder(stop_at=4))
    with pytest.raises(UserError, match=r"learning_rate=0.01: 3 steps in a row .*last good checkpoint: .*step-4\); lower it"):
        run(settings, tmp_path, model=spoiled(settings, 999))
    assert steps(tmp_path) == ["step-3", "step-4"]


def test_no_finite_step_at_all_is_an_error() -> None:
    empty = job(config(), Recorder())
    empty.batches = lambda epoch, first: []
    with pytest.raises(UserError, match="data_path=-: no step"):
        train(empty)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    plain = run(config(epochs=1, lora_dropout=0.0), tmp_path / "plain")
    checked = run(config(epochs=1, lora_dropout=0.0, gradient_checkpointing=True), tmp_path / "checked")
    assert checked.outcome.metrics["loss"] == pytest.approx(plain.outcome.metrics["loss"], rel=1e-5)
    for name, value in plain.weights.items():
        torch.testing.assert_close(checked.weights[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_learns_about_as_well(tmp_path: Path, dtype: str) -> None:
    exact = run(config(epochs=3, lora_dropout=0.0), tmp_path / "exact").outcome
    half = run(config(epochs=3, lora_dropout=0.0, dtype=dtype), tmp_path / "half")
    assert half.outcome.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.1)
    assert all(value.dtype == torch.float32 for value in half.weights.values())


def test_float16_finds_its_scale_and_keeps_it_in_the_checkpoint(tmp_path: Path) -> None:
    """A loss scale that overflows is halved, without the steps counting as bad ones."""
    settings = config(dtype="float16", max_bad_steps=2, epochs=8)
    with pytest.MonkeyPatch.context() as patch_:
        patch_.setattr(loop, "_FIRST_SCALE", 2.0**20)
        patch_.setattr(loop, "_CLEAN_STEPS", 10**6)
        run(settings, tmp_path)
    state = checkpoint.read_state(checkpoint.by_step(tmp_path)[-1])
    assert state is not None
    assert state.scale == 2.0 ** (20 - state.skipped)
    assert 0 < state.skipped < state.step
    assert state.bad == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "missing", "half a state", "flipped state", "other settings"])
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
        other = Store(Mirror(tmp_path), 2)
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
        with pytest.raises(UserError, match=r"output_dir: .*No space left on device; whole ones: step-2, step-3\); make room"):
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


def test_running_out_of_memory_names_the_shape_and_what_to_lower() -> None:
    work = job(config(), Recorder())

    def forward(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    work.model.get_base_model().model.forward = forward
    with pytest.raises(UserError, match=r"a batch of 3 x 10 tokens, up to 2 branches .* lower batch_size, .*max_sample_tokens"):
        train(work)


def test_the_rate_follows_the_data_whatever_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on with fewer workers, so with more steps to come, keeps to its schedule."""
    settings = config(epochs=1, accumulation_steps=1)

    def rate(workers: int, batches: int) -> float:
        monkeypatch.setattr(loop, "_workers", lambda: workers)
        moving = loop._Run(replace(job(settings, Recorder()), per_epoch=600), None)
        moving.state.batches = batches
        return learning_rate(settings, moving.position(), moving.planned)

    for batches in (100, 300, 500):
        assert rate(1, batches) == pytest.approx(rate(2, batches), rel=0.02)
    assert rate(1, 100) > rate(1, 500)
