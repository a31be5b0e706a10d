"""The loop without Ray: it learns, stops, resumes as if undisturbed, and leaves out steps that are not finite."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from tiny import tiny_llama

from parallelmind.config import LoraConfig, RopeConfig, TrainConfig
from parallelmind.data.grouping import Row, Seeds, groups, make_batch, regrouped
from parallelmind.errors import UserError
from parallelmind.layout import Batch, Tokens
from parallelmind.model.adapter import add_lora
from parallelmind.model.patch import patch
from parallelmind.training import checkpoint
from parallelmind.training.loop import Job, Outcome, Save, train

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


class Recorder:
    """Hooks that keep what they are told; ask to stop from the poll named on."""

    def __init__(self, folder: Path, stop_at: int | None = None) -> None:
        self.folder, self.stop_at, self.polled = folder, stop_at, 0
        self.lines: list[str] = []
        self.metrics: dict[int, dict[str, float]] = {}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics[step] = self.metrics.get(step, {}) | dict(metrics)

    def say(self, line: str) -> None:
        self.lines.append(line)

    def report(self, metrics: Mapping[str, float], step: int, save: Save | None) -> None:
        if save is not None:
            save(self.folder / f"step-{step}")

    def should_stop(self) -> bool:
        self.polled += 1
        return self.stop_at is not None and self.polled >= self.stop_at


def fresh_model(settings: TrainConfig) -> PeftModel:
    model = tiny_llama()
    patch(model, settings.part(RopeConfig))
    return add_lora(model, settings.part(LoraConfig), seed=0)


def job(settings: TrainConfig, hooks: Recorder, model: PeftModel | None = None) -> Job:
    rope = settings.part(RopeConfig)

    def stream(epoch: int, first: int) -> Iterator[Batch]:
        for group in islice(groups(ROWS, settings, Seeds(settings.seed, epoch)), first, None):
            yield group.batch(rope, 0)

    validation = {n: [make_batch(regrouped(ROWS, n, 8, settings), rope, 0)] for n in settings.validation_branches}
    return Job(settings, model or fresh_model(settings), stream, hooks, planned=6, validation=validation)


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}


def test_loss_falls_and_lines_and_metrics_are_told(tmp_path: Path) -> None:
    hooks = Recorder(tmp_path)
    outcome = train(job(config(), hooks))
    assert outcome.finished
    assert outcome.step == 6
    assert hooks.metrics[6]["loss"] < hooks.metrics[1]["loss"]
    assert hooks.metrics[6]["validation/branch_tax_4"] == pytest.approx(
        hooks.metrics[6]["validation/loss_4"] - hooks.metrics[6]["validation/loss_1"]
    )
    assert hooks.lines[0].startswith("step 1/6  loss ")
    assert "tok/s  ETA" in hooks.lines[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4", "step-6"]


@pytest.mark.parametrize(("poll", "step"), [(1, 1), (3, 3), (4, 3), (5, 4)])  # the fourth comes at the end of an epoch
def test_resume_equals_the_undisturbed_run(tmp_path: Path, poll: int, step: int) -> None:
    settings = config()
    whole = job(settings, Recorder(tmp_path / "whole"))
    expected = train(whole)
    first = train(job(settings, Recorder(tmp_path / "cut", poll)))
    assert (first.finished, first.step) == (False, step)
    saved = checkpoint.newest(tmp_path / "cut", settings.fingerprint())
    assert saved == tmp_path / "cut" / f"step-{step}"
    second = job(settings, Recorder(tmp_path / "cut"))
    outcome = train(second, saved)
    assert outcome.metrics["loss"] == expected.metrics["loss"]
    for name, value in weights(whole.model).items():
        assert torch.equal(value, weights(second.model)[name]), name


def test_max_steps_ends_the_run(tmp_path: Path) -> None:
    outcome = train(job(config(max_steps=2), Recorder(tmp_path)))
    assert (outcome.finished, outcome.step) == (True, 2)


def test_a_step_without_a_finite_loss_is_left_out_and_counted(tmp_path: Path) -> None:
    hooks = Recorder(tmp_path)
    work = job(config(epochs=1), hooks)
    layer = work.model.get_base_model().get_output_embeddings()
    calls = iter(range(1000))
    layer.register_forward_hook(lambda module, args, output: output * (float("nan") if next(calls) < 2 else 1.0))
    outcome = train(work)
    assert outcome.metrics["skipped_steps"] == 1
    assert np.isfinite(outcome.metrics["loss"])
    assert all(value.isfinite().all() for value in weights(work.model).values())
    assert any("step left out" in line for line in hooks.lines)


def test_no_finite_step_at_all_is_an_error(tmp_path: Path) -> None:
    empty = job(config(), Recorder(tmp_path))
    empty.batches = lambda epoch, first: []
    with pytest.raises(UserError, match="data_path: no step"):
        train(empty)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    def run(**settings: object) -> tuple[Outcome, dict[str, torch.Tensor]]:
        work = job(config(epochs=1, lora_dropout=0.0, **settings), Recorder(tmp_path / str(len(settings))))
        return train(work), weights(work.model)

    (plain, expected), (checked, found) = run(), run(gradient_checkpointing=True)
    assert checked.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no state"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    settings = config()
    train(job(settings, Recorder(tmp_path)))
    newest = tmp_path / "step-6"
    target = newest / ("state.json" if damage == "no state" else "optimizer.pt")
    data = target.read_bytes()
    if damage in ("cut", "no state"):
        target.write_bytes(data[: len(data) // 2])
    elif damage == "changed":
        target.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        target.unlink()
    assert checkpoint.newest(tmp_path, settings.fingerprint()) == tmp_path / "step-4"


def test_a_checkpoint_of_other_settings_does_not_count(tmp_path: Path) -> None:
    train(job(config(), Recorder(tmp_path)))
    assert checkpoint.newest(tmp_path, config(seed=1).fingerprint()) is None
    assert json.loads((tmp_path / "step-6" / "state.json").read_text())["epoch"] == 2
