"""Short runs of the training loop without Ray, on a tiny model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict
from tiny import tiny_llama

from parallelmind.config import TrainConfig
from parallelmind.data.held_out import regroup_branches
from parallelmind.data.packing import EpochSeed, TokenRecord, make_batch, sample_batches
from parallelmind.layout import Batch, Tokens
from parallelmind.model.adapter import add_lora
from parallelmind.model.patch import patch
from parallelmind.remote import RemotePath
from parallelmind.training.checkpoint_manager import CheckpointManager, checkpoint_dirs
from parallelmind.training.loop import TrainingInputs, train
from parallelmind.training.outcome import Outcome

ROWS = [TokenRecord(Tokens.of([], [[5 + i % 7, 20, 30 + i % 3, 40, 2]]), standalone=True) for i in range(36)]


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
    """Hooks that record lines and metrics, and ask to stop from the poll number `stop_at` on."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.polled = stop_at, 0
        self.lines: list[str] = []
        self.metrics: dict[int, dict[str, float]] = {}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.metrics[step] = self.metrics.get(step, {}) | dict(metrics)

    def print_line(self, line: str) -> None:
        self.lines.append(line)

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def should_stop(self) -> bool:
        self.polled += 1
        return self.stop_at is not None and self.polled >= self.stop_at


def fresh_model(settings: TrainConfig) -> PeftModel:
    model = tiny_llama()
    patch(model, settings.rope)
    return add_lora(model, settings.lora, seed=0)


def weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}


def training_inputs(
    settings: TrainConfig,
    hooks: Recorder,
    model: PeftModel | None = None,
    checkpoints: CheckpointManager | None = None,
) -> TrainingInputs:
    rope = settings.rope

    def stream(epoch: int, first: int) -> Iterator[Batch]:
        for group in islice(
            sample_batches(ROWS, settings.data, EpochSeed(settings.optimizer.seed, epoch)), first, None
        ):
            yield group.collate(rope, 0)

    validation = {
        n: [make_batch(regroup_branches(ROWS, n, 8, settings.data), rope, 0)]
        for n in settings.metrics.validation_branches
    }
    return TrainingInputs(
        settings,
        settings.fingerprint(),
        model or fresh_model(settings),
        stream,
        hooks,
        batches_per_epoch=6,
        validation=validation,
        checkpoints=checkpoints,
    )


def run(
    settings: TrainConfig, folder: Path, hooks: Recorder | None = None, model: PeftModel | None = None
) -> Run:
    """Train with checkpoints in `folder`, from the newest one if there is any."""
    hooks = hooks or Recorder()
    manager = CheckpointManager(RemotePath(folder), settings.checkpoint.keep_checkpoints)
    inputs = training_inputs(settings, hooks, model, manager)
    try:
        newest = manager.resume(settings.fingerprint(), hooks.print_line)
        return Run(train(inputs, newest), hooks, weights(inputs.model))
    finally:
        manager.close()


def deterministic_metrics(run: Run) -> dict[tuple[int, str], float]:
    """Every metric that does not depend on the clock or the machine, by step and name."""
    excluded = ("tokens_per_second", "peak_memory_gib", "seconds")
    return {
        (step, name): value
        for step, metrics in run.hooks.metrics.items()
        for name, value in metrics.items()
        if name not in excluded
    }


def checkpoint_steps(folder: Path) -> list[str]:
    return [path.name for path in checkpoint_dirs(folder)]


def assert_same_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
