"""The loop without Ray: it learns, stops, resumes as if undisturbed, and leaves out steps that are not
finite.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from looping import Recorder, config, fresh_model, job, logged, run, same, steps
from peft import PeftModel
from tiny import tiny_llama

from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from parallelmind.model import attention
from parallelmind.remote import RemotePath
from parallelmind.training import checkpoint, loop
from parallelmind.training.loop import train
from parallelmind.training.step import learning_rate


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
    monkeypatch.setattr(
        attention, "choose_attention", lambda _, limit, __: "flex_attention" if limit > 256 else "sdpa"
    )
    lines: list[str] = []
    say = attention.AttentionLogger(tiny_llama(), torch.float32, lines.append)
    batches: list[Any] = [
        SimpleNamespace(ids=np.zeros((1, length))) for length in (64, 32, 512, 16, 256, 100, 300)
    ]
    assert list(say(batches)) == batches
    assert lines == [
        "attention: sdpa for up to 64 tokens",
        "attention: flex_attention for up to 512 tokens",
        "attention: sdpa for up to 256 tokens",
    ]


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize(
    ("poll", "step"), [(1, 1), (3, 3), (4, 3), (5, 4)]
)  # the fourth comes at the end of an epoch
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
    """Also from one that is older than the newest, as after damage: the logged losses are the same once
    more.
    """
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
    settings = config(
        epochs=4,
        schedule="constant",
        warmup_ratio=0.0,
        learning_rate=0.02,
        validate_every=1,
        keep_checkpoints=1,
    )
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
    head.register_forward_hook(
        lambda module, args, output: output * (float("nan") if next(numbers) < calls else 1.0)
    )
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
    with pytest.raises(
        UserError, match=r"learning_rate=0.01: 3 steps in a row .*last good checkpoint: .*step-4\); lower it"
    ):
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


def test_running_out_of_memory_names_the_shape_and_what_to_lower() -> None:
    work = job(config(), Recorder())

    def forward(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    work.model.get_base_model().model.forward = forward
    with pytest.raises(
        UserError,
        match=r"a batch of 3 x 10 tokens, up to 2 branches .* lower batch_size, .*max_sample_tokens",
    ):
        train(work)


def test_the_rate_follows_the_data_whatever_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on with fewer workers, so with more steps to come, keeps to its schedule."""
    settings = config(epochs=1, accumulation_steps=1)

    def rate(workers: int, batches: int) -> float:
        monkeypatch.setattr(loop, "_workers", lambda: workers)
        moving = loop._Run(replace(job(settings, Recorder()), per_epoch=600), None)
        moving.state.batches = batches
        return learning_rate(settings.optimizer, moving.position(), moving.planned)

    for batches in (100, 300, 500):
        assert rate(1, batches) == pytest.approx(rate(2, batches), rel=0.02)
    assert rate(1, 100) > rate(1, 500)


def test_an_epoch_that_was_planned_wrong_is_counted_for_those_to_come(tmp_path: Path) -> None:
    """Also by a run that goes on, whatever it would have planned itself."""
    settings = config(epochs=3, keep_checkpoints=99)
    rates = []
    for planned in (6, 2):
        hooks = Recorder()
        store = checkpoint.CheckpointManager(RemotePath(tmp_path / str(planned)), 99)
        train(replace(job(settings, hooks, store=store), per_epoch=planned))
        store.close()
        rates.append([hooks.metrics[step]["learning_rate"] for step in sorted(hooks.metrics)])
    right, wrong = rates
    assert right[:3] != pytest.approx(wrong[:3])
    assert right[3:] == pytest.approx(wrong[3:])
    hooks = Recorder()
    train(replace(job(settings, hooks), per_epoch=100), resume=tmp_path / "2" / "step-2")
    assert [hooks.metrics[step]["learning_rate"] for step in sorted(hooks.metrics)] == wrong[2:]
