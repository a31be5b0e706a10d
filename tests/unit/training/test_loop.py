"""The training loop without Ray: it learns, stops, resumes exactly, and skips steps without a finite loss."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from looping import (
    Recorder,
    assert_same_weights,
    checkpoint_steps,
    config,
    deterministic_metrics,
    fresh_model,
    run,
    training_inputs,
)
from peft import PeftModel
from tiny import tiny_llama

from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from parallelmind.model import attention
from parallelmind.remote import RemotePath
from parallelmind.training import loop
from parallelmind.training.checkpoint import read_state
from parallelmind.training.checkpoint_manager import CheckpointManager, checkpoint_dirs
from parallelmind.training.loop import train
from parallelmind.training.step import learning_rate


def test_loss_falls_and_lines_and_metrics_are_deterministic_metrics(tmp_path: Path) -> None:
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


def test_a_line_after_a_validation_counts_the_tokens_before_it(tmp_path: Path) -> None:
    _, hooks, _ = run(config(log_every=100, validate_every=6), tmp_path)
    assert hooks.lines[-1].startswith("step 6/6  loss ")
    assert hooks.metrics[6]["tokens_per_second"] > 0


def test_a_validation_is_logged_at_its_step_alone(tmp_path: Path) -> None:
    class Points(Recorder):
        def log(self, metrics: Mapping[str, float], step: int) -> None:
            assert not self.metrics.get(step, {}).keys() & metrics.keys(), "a store keeps the first of two"
            super().log(metrics, step)

    _, hooks, _ = run(config(log_every=1, validate_every=3, checkpoint_every=1), tmp_path, Points())
    validated = [step for step, metrics in hooks.metrics.items() if "validation/loss_1" in metrics]
    assert validated == [3, 6]
    assert len({hooks.metrics[step]["validation/loss_1"] for step in validated}) == 2


def test_attention_is_printed_once_for_all_shorter_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        attention, "choose_attention", lambda _, limit, *__: "flex_attention" if limit > 256 else "sdpa"
    )
    lines: list[str] = []
    log_attention = attention.AttentionLogger(tiny_llama(), torch.float32, lines.append)
    lengths = (64, 32, 512, 16, 256, 100, 300)
    batches: list[Any] = [SimpleNamespace(ids=np.zeros((1, n)), is_flat=True) for n in lengths]
    assert list(log_attention(batches)) == batches
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
    undisturbed = run(settings, tmp_path / "whole")
    stopped = run(settings, tmp_path / "cut", Recorder(poll))
    assert (stopped.outcome.finished, stopped.outcome.step) == (False, step)
    resumed = run(settings, tmp_path / "cut")
    assert resumed.outcome.metrics["loss"] == undisturbed.outcome.metrics["loss"]
    assert deterministic_metrics(stopped) | deterministic_metrics(resumed) == deterministic_metrics(
        undisturbed
    )
    assert_same_weights(resumed.weights, undisturbed.weights)


def test_every_checkpoint_leads_to_the_same_end(tmp_path: Path) -> None:
    """Also an older one, as after damage to the newest; the logged losses are the same resumed."""
    settings = config(keep_checkpoints=10)
    undisturbed = run(settings, tmp_path)
    for name in checkpoint_steps(tmp_path)[:-1]:
        other = tmp_path / f"from-{name}"
        shutil.copytree(tmp_path / name, other / name)
        resumed = run(settings, other)
        assert_same_weights(resumed.weights, undisturbed.weights)
        assert deterministic_metrics(resumed).items() <= deterministic_metrics(undisturbed).items()


def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path: Path) -> None:
    """The learning rate is absurd after a good start, so the best validation is an early one; none is NaN."""
    settings = config(
        epochs=4,
        schedule="constant",
        warmup_ratio=0.0,
        learning_rate=0.02,
        validate_every=1,
        keep_checkpoints=1,
    )
    losses = iter([math.nan, 3.0, 2.0, *[5.0] * 20])
    with pytest.MonkeyPatch.context() as patch_:
        patch_.setattr(loop, "validation_metrics", lambda *_: {"validation/loss_1": next(losses)})
        outcome = run(settings, tmp_path).outcome
    assert checkpoint_steps(tmp_path) == ["step-3", f"step-{outcome.step}"]
    state = read_state(tmp_path / f"step-{outcome.step}")
    assert state is not None
    assert (state.best_loss, state.best_step) == (2.0, 3)


def test_max_steps_ends_the_run(tmp_path: Path) -> None:
    outcome = train(training_inputs(config(max_steps=2), Recorder()))
    assert (outcome.finished, outcome.step) == (True, 2)


def model_with_nan_logits(settings: TrainConfig, calls: int) -> PeftModel:
    """A model whose first `calls` forward passes give NaN logits."""
    model = fresh_model(settings)
    numbers = iter(range(1000))
    head = model.get_base_model().get_output_embeddings()
    head.register_forward_hook(
        lambda module, args, output: output * (float("nan") if next(numbers) < calls else 1.0)
    )
    return model


def test_a_step_without_a_finite_loss_is_skipped_and_counted(tmp_path: Path) -> None:
    settings = config(epochs=1)
    outcome, hooks, weights = run(settings, tmp_path, model=model_with_nan_logits(settings, 2))
    assert outcome.metrics["skipped_steps"] == 1
    assert np.isfinite(outcome.metrics["loss"])
    assert all(value.isfinite().all() for value in weights.values())
    assert any("step skipped" in line for line in hooks.lines)


@pytest.mark.parametrize("log_every", [1, 100])
def test_too_many_bad_steps_end_the_run_and_name_the_last_good_checkpoint(
    tmp_path: Path, log_every: int
) -> None:
    settings = config(epochs=9, max_bad_steps=3, log_every=log_every)
    run(settings, tmp_path, Recorder(stop_at=4))
    with pytest.raises(
        UserError,
        match=r"learning_rate=0.01: 3 consecutive .* up to step 6 \(last good checkpoint: .*step-4\); lower",
    ):
        run(settings, tmp_path, model=model_with_nan_logits(settings, 999))
    assert checkpoint_steps(tmp_path) == ["step-3", "step-4"]


def test_no_finite_step_at_all_is_an_error() -> None:
    empty = training_inputs(config(), Recorder())
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
    """A loss scale that overflows is halved, and the step does not count as bad."""
    settings = config(dtype="float16", max_bad_steps=2, epochs=8)
    with pytest.MonkeyPatch.context() as patch_:
        patch_.setattr(loop, "_INITIAL_LOSS_SCALE", 2.0**20)
        patch_.setattr(loop, "_STEPS_PER_SCALE", 10**6)
        run(settings, tmp_path)
    state = read_state(checkpoint_dirs(tmp_path)[-1])
    assert state is not None
    assert state.loss_scale == 2.0 ** (20 - state.skipped_steps)
    assert 0 < state.skipped_steps < state.step
    assert state.bad_steps == 0


def test_running_out_of_memory_names_the_shape_and_what_to_lower() -> None:
    inputs = training_inputs(config(), Recorder())

    def forward(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    inputs.model.get_base_model().model.forward = forward
    with pytest.raises(
        UserError,
        match=r"a batch of 3 x 10 tokens with 6 branches; lower batch_tokens or batch_size, "
        r".*max_sample_tokens",
    ):
        train(inputs)


def test_the_learning_rate_depends_on_the_data_not_on_the_number_of_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that resumes with fewer workers takes more steps and keeps its schedule."""
    settings = config(epochs=1, accumulation_steps=1)

    def rate(workers: int, batches: int) -> float:
        monkeypatch.setattr(loop, "_world_size", lambda: workers)
        trainer = loop.Trainer(replace(training_inputs(settings, Recorder()), batches_per_epoch=600), None)
        trainer.state.batches = batches
        return learning_rate(settings.optimizer, trainer.position(), trainer.planned_steps)

    for batches in (100, 300, 500):
        assert rate(1, batches) == pytest.approx(rate(2, batches), rel=0.02)
    assert rate(1, 100) > rate(1, 500)


def test_a_wrong_estimate_of_batches_per_epoch_is_corrected_after_one_epoch(tmp_path: Path) -> None:
    """A resumed run keeps the corrected number, not its own estimate."""
    settings = config(epochs=3, keep_checkpoints=99)
    rates = []
    for planned in (6, 2):
        hooks = Recorder()
        manager = CheckpointManager(RemotePath(tmp_path / str(planned)), 99)
        train(replace(training_inputs(settings, hooks, checkpoints=manager), batches_per_epoch=planned))
        manager.close()
        rates.append([hooks.metrics[step]["learning_rate"] for step in sorted(hooks.metrics)])
    right, wrong = rates
    assert right[:3] != pytest.approx(wrong[:3])
    assert right[3:] == pytest.approx(wrong[3:])
    hooks = Recorder()
    train(
        replace(training_inputs(settings, hooks), batches_per_epoch=100),
        resume_from=tmp_path / "2" / "step-2",
    )
    assert [hooks.metrics[step]["learning_rate"] for step in sorted(hooks.metrics)] == wrong[2:]
