"""Training loop of one worker. Data comes from a function; metrics and stop requests go through `Hooks`.

All workers take the same decisions (end of the data, stop, skipped step), because each decision depends on
sums over all workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import set_seed

from parallelmind.config import OptimizerConfig, TrainConfig
from parallelmind.errors import UserError
from parallelmind.hardware import decided_dtype
from parallelmind.layout import Batch
from parallelmind.model.attention import AttentionLogger
from parallelmind.model.structure import causal_lm
from parallelmind.training.checkpoint import TrainingState, restore, snapshot
from parallelmind.training.checkpoint_manager import CheckpointWriter, newest_checkpoint
from parallelmind.training.collectives import sum_over_workers
from parallelmind.training.compilation import compile_layers, pad_to_bucket
from parallelmind.training.hooks import Hooks
from parallelmind.training.loss import TargetLoss
from parallelmind.training.metrics_logger import MetricsLogger
from parallelmind.training.outcome import Outcome
from parallelmind.training.sharding import shard
from parallelmind.training.step import (
    accumulate_gradients,
    evaluate,
    learning_rate,
    make_optimizer,
    optimizer_step,
    set_learning_rate,
)
from parallelmind.training.unread import UnreadStep, read_all

# float16: the first loss scale, and the number of finite steps after which it is doubled.
_INITIAL_LOSS_SCALE, _STEPS_PER_SCALE = 2.0**8, 1000


@dataclass(slots=True)
class TrainingInputs:
    """Inputs of `train`.

    batches: function of (epoch, first batch) that returns this worker's batches of an epoch.
    batches_per_epoch: of all workers, estimated. validation: this worker's held-out batches, by branches per
    sample. checkpoints: set on rank 0, and on every worker of a sharded run. config_hash: of the run; the
    checkpoints hold it. device: to which a sharded model moves.
    """

    config: TrainConfig
    config_hash: str
    model: nn.Module
    batches: Callable[[int, int], Iterable[Batch]]
    hooks: Hooks
    batches_per_epoch: int
    validation: Mapping[int, list[Batch]]
    checkpoints: CheckpointWriter | None = None
    run_id: str | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def train(inputs: TrainingInputs, resume_from: Path | None = None) -> Outcome:
    """Train to the end, or until a hook asks to stop. Both end with a checkpoint.

    Raises:
        UserError: the data has no target token, too many consecutive steps had no finite gradient, or memory
            or disk is full.
    """
    trainer = Trainer(inputs, resume_from)
    while trainer.state.epoch < inputs.config.optimizer.epochs and not trainer.is_done:
        trainer.train_epoch()
    trainer.read_steps()
    if not trainer.stopped:
        if trainer.state.step == trainer.state.skipped_steps:
            raise UserError(
                f"data_path={inputs.config.data.data_path}: no step had a finite loss on any target; "
                "check answer_offset, the length limits and learning_rate"
            )
        trainer.metrics_logger.log(trainer.state, trainer.planned_steps)  # a stopped run logs when it resumes
    trainer.report(validate=not trainer.stopped, save=True)
    if inputs.checkpoints:
        inputs.checkpoints.wait()
    return Outcome(not trainer.stopped, trainer.state.step, trainer.state.metrics)


class Trainer:
    """Loss, optimizer and state of a run while it trains."""

    def __init__(self, inputs: TrainingInputs, resume_from: Path | None) -> None:
        self.inputs, self.config, self.hooks = inputs, inputs.config, inputs.hooks
        self.optimizer_config, self.dtype = self.config.optimizer, decided_dtype(self.config.model.dtype)
        if self.optimizer_config.gradient_checkpointing:
            causal_lm(inputs.model).activation_checkpointing_enable()
        if self.optimizer_config.compile:
            compile_layers(inputs.model)
        self.loss = TargetLoss(inputs.model, self.config.rope.visibility, getattr(torch, self.dtype)).train()
        if self.config.workers.sharding == "full":
            shard(self.loss, inputs.device)
        self.optimizer = make_optimizer(self.loss, self.optimizer_config)
        if resume_from is None:
            self.state = self._initial_state()
        else:
            self.state = restore(resume_from, inputs.model, self.optimizer)
        # A resumed run keeps the estimate of its checkpoint, and so its learning rate schedule.
        self.state.batches_per_epoch = self.state.batches_per_epoch or inputs.batches_per_epoch
        self.stopped = False
        self.validated_at: int | None = None
        self.unread: list[UnreadStep] = []
        self.metrics_logger = MetricsLogger(self.hooks)
        self.attention_logger = AttentionLogger(inputs.model, self.loss.dtype, self.hooks.print_line)

    def _initial_state(self) -> TrainingState:
        scale = _INITIAL_LOSS_SCALE if self.dtype == "float16" else 1.0
        return TrainingState(self.inputs.config_hash, self.inputs.run_id, loss_scale=scale)

    @property
    def planned_steps(self) -> int:
        return planned_steps(
            self.optimizer_config, self.state.batches_per_epoch, self.config.batches_per_step
        )

    @property
    def is_done(self) -> bool:
        """Whether the run was stopped or has reached max_steps."""
        max_steps = self.optimizer_config.max_steps
        return self.stopped or (max_steps is not None and self.state.step >= max_steps)

    def train_epoch(self) -> None:
        """Train on the rest of an epoch."""
        batches = self._shaped(self.inputs.batches(self.state.epoch, self.state.batches))
        stream = iter(self.attention_logger(batches))
        while not self.is_done:
            if not self.train_step(stream):
                self.state.batches_per_epoch = self.state.batches or self.state.batches_per_epoch
                self.state.epoch, self.state.batches = self.state.epoch + 1, 0
                return

    def _shaped(self, batches: Iterable[Batch]) -> Iterable[Batch]:
        return map(pad_to_bucket, batches) if self.optimizer_config.compile else batches

    def train_step(self, stream: Iterator[Batch]) -> bool:
        """Launch one optimizer step; False if no worker has data left. Nothing is read from the device."""
        own_batches = len(range(_rank(), self.config.batches_per_step, _world_size()))
        own, loss_sum = accumulate_gradients(
            self.loss, stream, own_batches, self.state.loss_scale, self._seed_dropout
        )
        own.stop = float(self.hooks.should_stop())
        totals = own.all_reduce()
        self.stopped = totals.stop > 0
        if not totals.batches:
            return False
        rate = learning_rate(self.optimizer_config, self.position(), self.planned_steps)
        loss_sum = sum_over_workers(loss_sum)
        norm = self._update_weights(loss_sum, totals.targets, rate)
        self.state.step += 1
        self.state.batches += int(totals.batches)
        self.state.branches += int(totals.branches)
        self.unread.append(UnreadStep(self.state.step, totals, rate, loss_sum, norm))
        self._after_step()
        return True

    def _seed_dropout(self, index: int) -> None:
        """Draw the same values for a batch of a step after a restart and on any number of workers.

        index: among this worker's batches of the step.
        """
        batch = _rank() + index * _world_size()
        set_seed(hash((self.optimizer_config.seed, self.state.step, batch)) % 2**32)

    def position(self) -> float:
        """Progress through the data in steps. The learning rate depends on it."""
        state = self.state
        epochs_done = state.epoch + min(state.batches / state.batches_per_epoch, 1)
        share_done = epochs_done / self.optimizer_config.epochs
        return max(
            share_done * self.planned_steps, float(state.step if self.optimizer_config.max_steps else 0)
        )

    def _update_weights(self, loss_sum: Tensor, targets: float, rate: float) -> Tensor:
        """Update the weights and return the gradient norm.

        A step without a target or a finite gradient changes nothing; its norm is not finite.
        """
        set_learning_rate(self.optimizer, rate)
        divisor = loss_sum.new_full((), targets * self.state.loss_scale or math.nan)
        divisor.masked_fill_(~loss_sum.isfinite(), math.nan)
        return optimizer_step(self.loss, self.optimizer, divisor, self.optimizer_config.gradient_clip)

    def read_steps(self) -> None:
        """Read losses and gradient norms of the steps since the last call: here the host waits."""
        unread, self.unread = self.unread, []
        for step, norm in read_all(unread):
            finite = math.isfinite(norm)
            if finite:
                self.state.bad_steps = 0
            else:
                self._skip_step(step)
            if self.dtype == "float16":
                self._update_loss_scale(finite)
            self.metrics_logger.add(self.state, step.totals, step.rate, norm)

    def _must_read(self) -> bool:
        """Whether the next step depends on results that are on the device.

        The loss scale of float16 does, and whether the run has failed.
        """
        unread = len(self.unread)
        return self.dtype == "float16" or self.state.bad_steps + unread >= self.optimizer_config.max_bad_steps

    def _skip_step(self, step: UnreadStep) -> None:
        state, totals = self.state, step.totals
        state.skipped_steps += 1
        if state.loss_scale == 1 or not math.isfinite(totals.loss):  # otherwise float16 lowers its loss scale
            state.bad_steps += 1
        self.hooks.print_line(
            f"step {step.number}: no finite gradient over {totals.targets:.0f} targets; step skipped"
        )
        if state.bad_steps < self.optimizer_config.max_bad_steps:
            return
        checkpoints = self.inputs.checkpoints
        if checkpoints:
            checkpoints.wait()
        newest = checkpoints and newest_checkpoint(checkpoints.folder, state.config_hash)
        raise UserError(
            f"learning_rate={self.optimizer_config.learning_rate}: {state.bad_steps} consecutive steps "
            f"without a finite gradient, up to step {step.number} (last good checkpoint: "
            f"{newest or 'none'}); lower it, or check the data"
        )

    def _update_loss_scale(self, finite: bool) -> None:
        """Halve the loss scale after an overflow, double it after many finite steps.

        Without a loss scale, float16 gradients underflow or overflow.
        """
        state = self.state
        state.clean_steps = state.clean_steps + 1 if finite else 0
        if not finite:
            state.loss_scale = max(state.loss_scale / 2, 1.0)
        elif state.clean_steps % _STEPS_PER_SCALE == 0:
            state.loss_scale *= 2

    def _after_step(self) -> None:
        step, metrics = self.state.step, self.config.metrics
        log = step % metrics.log_every == 0
        save = step % self.config.checkpoint.checkpoint_every == 0
        validate = step % metrics.validate_every == 0
        if log or save or validate or self._must_read():
            self.read_steps()
        if log:
            self.metrics_logger.log(self.state, self.planned_steps)
        if save or validate:
            self.report(validate, save)

    def report(self, validate: bool, save: bool) -> None:
        """Validate, save a checkpoint, report. A checkpoint is also saved when the validation is the best."""
        if validate and self.inputs.validation and self.validated_at != self.state.step:
            improved = self._validate()
            save = save or improved
        if save:
            copy = snapshot(self.inputs.model, self.optimizer, self.state)  # by every worker
            if self.inputs.checkpoints:
                self.inputs.checkpoints.save(copy)
        self.hooks.report(self.state.metrics, self.state.step)

    def _validate(self) -> bool:
        """Validate; True if the mean of the validation losses is the lowest so far."""
        self.validated_at, started = self.state.step, time.perf_counter()
        batches = {count: list(self._shaped(own)) for count, own in self.inputs.validation.items()}
        metrics = validation_metrics(self.loss, batches)
        self.metrics_logger.log_validation(self.state, metrics, started)
        losses = [value for name, value in metrics.items() if name.startswith("validation/loss_")]
        if not losses:
            return False
        mean = sum(losses) / len(losses)
        if not mean < (math.inf if self.state.best_loss is None else self.state.best_loss):
            return False
        self.state.best_loss, self.state.best_step = mean, self.state.step
        return True


def planned_steps(optimizer: OptimizerConfig, batches_per_epoch: int, batches_per_step: int) -> int:
    """Estimated number of optimizer steps of a run."""
    steps = steps_of_epochs(optimizer, batches_per_epoch, batches_per_step)
    return steps if optimizer.max_steps is None else min(steps, optimizer.max_steps)


def steps_of_epochs(optimizer: OptimizerConfig, batches_per_epoch: int, batches_per_step: int) -> int:
    """Estimated number of optimizer steps in all epochs, whatever max_steps is."""
    steps_per_epoch = max(1, math.ceil(batches_per_epoch / batches_per_step))
    return steps_per_epoch * optimizer.epochs


def validation_metrics(loss: TargetLoss, batches: Mapping[int, list[Batch]]) -> dict[str, float]:
    """Mean loss at each branch count, and the branch tax: that loss minus the loss at one branch.

    batches: this worker's batches by branches per sample; the text is the same at every branch count.
    """
    losses = {}
    for branches, own in sorted(batches.items()):
        totals = evaluate(loss, own).all_reduce()
        if totals.targets:
            losses[branches] = totals.loss / totals.targets
    taxes = {
        f"validation/branch_tax_{branches}": value - losses[1]
        for branches, value in losses.items()
        if branches > 1 and 1 in losses
    }
    return {f"validation/loss_{branches}": value for branches, value in losses.items()} | taxes


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
