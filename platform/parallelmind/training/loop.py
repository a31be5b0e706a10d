"""The training loop of one worker. It knows no Ray: batches come from a function and everything outward goes
to hooks.

All workers decide alike, because each decision (the data has ended, stop, skip this step) rests on sums over
all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from transformers import set_seed

from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from parallelmind.layout import Batch
from parallelmind.model.attention import AttentionLogger
from parallelmind.model.structure import causal_lm
from parallelmind.model.weights import load_weights
from parallelmind.training import checkpoint
from parallelmind.training.checkpoint import CheckpointManager, State
from parallelmind.training.loss import TargetLoss
from parallelmind.training.metrics_logger import MetricsLogger
from parallelmind.training.outcome import Outcome
from parallelmind.training.sharding import shard
from parallelmind.training.step import (
    Totals,
    accumulate_gradients,
    evaluate,
    learning_rate,
    make_optimizer,
    optimizer_step,
)

_FIRST_SCALE, _CLEAN_STEPS = (
    2.0**8,
    1000,
)  # float16: the scale of loss sums to begin with, doubled after so many steps


class Hooks(Protocol):
    """What the loop tells the outside, on every worker alike."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def say(self, line: str) -> None: ...

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        """At validations and checkpoints."""

    def should_stop(self) -> bool: ...


@dataclass(slots=True)
class Job:
    """What `train` works on.

    batches: this worker's turns of an epoch's batches, from the given one on. per_epoch: about how many an
    epoch has, of all workers. validation: this worker's share of the held-out batches, by branches per
    sample. store: on the first worker.
    """

    config: TrainConfig
    model: nn.Module
    batches: Callable[[int, int], Iterable[Batch]]
    hooks: Hooks
    per_epoch: int
    validation: Mapping[int, list[Batch]]
    store: CheckpointManager | None = None
    run_id: str | None = None


def train(job: Job, resume: Path | None = None) -> Outcome:
    """Train to the end, or until a hook asks to stop; either way with a checkpoint at the end.

    Raises UserError if the data gives no target at all, for too many steps in a row without a finite
    gradient, and for memory or a disk that is too small.
    """
    run = _Run(job, resume)
    while run.state.epoch < job.config.optimizer.epochs and not run.ended:
        run.epoch()
    if not run.stopped and run.state.step == run.state.skipped:
        raise UserError(
            f"data_path={job.config.data.data_path}: no step had a finite loss on any target; "
            "check answer_offset, the limits and learning_rate"
        )
    if not run.stopped:  # what a stopped run has not told yet it tells when it goes on
        run.meter.tell(run.state, run.planned)
    run.report(validate=not run.stopped, save=True)
    if job.store:
        job.store.wait()
    return Outcome(not run.stopped, run.state.step, run.state.metrics)


class _Run:
    """The moving parts: loss, optimizer and position."""

    def __init__(self, job: Job, resume: Path | None) -> None:
        self.job, self.config = job, job.config
        if self.config.optimizer.gradient_checkpointing:
            causal_lm(job.model).activation_checkpointing_enable()
        scale = _FIRST_SCALE if self.config.model.dtype == "float16" else 1.0
        self.state = State(self.config.fingerprint(), job.run_id, scale=scale)
        saved = checkpoint.read(resume) if resume is not None else None
        if saved is not None:
            load_weights(job.model, saved.weights, str(resume))
            self.state = saved.state
        self.state.per_epoch = (
            self.state.per_epoch or job.per_epoch
        )  # the checkpoint's: a resumed run keeps to its schedule
        self.loss = TargetLoss(
            job.model, self.config.rope.visibility, getattr(torch, self.config.model.dtype)
        ).train()
        if self.config.workers.sharding == "full":
            shard(self.loss)
        self.optimizer = make_optimizer(self.loss, self.config.optimizer)
        if saved is not None:
            checkpoint.restore_optimizer(job.model, self.optimizer, saved.optimizer)
        self.stopped = False
        self.validated_at: int | None = None
        self.meter = MetricsLogger(job.hooks)
        self.announce = AttentionLogger(job.model, self.loss.dtype, job.hooks.say)

    @property
    def planned(self) -> int:
        return planned_steps(self.config, self.state.per_epoch, _workers())

    @property
    def ended(self) -> bool:
        return self.stopped or (
            self.config.optimizer.max_steps is not None and self.state.step >= self.config.optimizer.max_steps
        )

    def epoch(self) -> None:
        stream = iter(self.announce(self.job.batches(self.state.epoch, self.state.batches)))
        while not self.ended:
            if not self.step(stream):
                self.state.per_epoch = self.state.batches or self.state.per_epoch
                self.state.epoch, self.state.batches = self.state.epoch + 1, 0
                return

    def step(self, stream: Iterator[Batch]) -> bool:
        """One optimizer step; false where no worker has data left."""
        set_seed(
            hash((self.config.optimizer.seed, self.state.step, _rank())) % 2**32
        )  # dropout, the same after a restart
        own = accumulate_gradients(
            self.loss, stream, self.config.optimizer.accumulation_steps, self.state.scale
        )
        own.stop = float(self.job.hooks.should_stop())
        totals = own.everywhere(self.loss.device)
        self.stopped = totals.stop > 0
        if not totals.batches:
            return False
        rate = learning_rate(self.config.optimizer, self.position(), self.planned)
        norm = self.apply(totals, rate)
        self.state.step += 1
        self.state.batches += int(totals.batches)
        self.state.branches += int(totals.branches)
        self.meter.add(self.state, totals, rate, norm)
        self.after_step()
        return True

    def position(self) -> float:
        """How far the run is, in steps of as many batches as there are workers now: the same data, the same
        rate.
        """
        done = (
            self.state.epoch + min(self.state.batches / self.state.per_epoch, 1)
        ) / self.config.optimizer.epochs
        return max(done * self.planned, float(self.state.step if self.config.optimizer.max_steps else 0))

    def apply(self, totals: Totals, rate: float) -> float:
        """Move the weights, unless there is no target or no finite gradient: such a step is counted and left
        out.
        """
        if not totals.targets or not math.isfinite(totals.loss):
            self.optimizer.zero_grad(set_to_none=True)
            norm = math.nan
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            norm = optimizer_step(
                self.loss,
                self.optimizer,
                totals.targets * self.state.scale,
                self.config.optimizer.gradient_clip,
            )
        if math.isfinite(norm):
            self.state.bad = 0
        else:
            self.skip(totals)
        if self.config.model.dtype == "float16":
            self.rescale(math.isfinite(norm))
        return norm

    def skip(self, totals: Totals) -> None:
        state = self.state
        state.skipped += 1
        state.bad += (
            1 if state.scale == 1 or not math.isfinite(totals.loss) else 0
        )  # float16 overflows while it finds its scale
        self.job.hooks.say(
            f"step {state.step + 1}: no finite gradient over {totals.targets:.0f} targets; step left out"
        )
        if state.bad >= self.config.optimizer.max_bad_steps:
            if self.job.store:
                self.job.store.wait()
            good = self.job.store and checkpoint.newest(self.job.store.folder, state.config_hash)
            raise UserError(
                f"learning_rate={self.config.optimizer.learning_rate}: {state.bad} steps in a row without a finite gradient, up to step "
                f"{state.step + 1} (last good checkpoint: {good or 'none'}); lower it, or look at the data"
            )

    def rescale(self, finite: bool) -> None:
        """float16 gradients vanish or overflow unless the loss is scaled to where they fit, which is found by
        trying.
        """
        state = self.state
        state.clean = state.clean + 1 if finite else 0
        if not finite:
            state.scale = max(state.scale / 2, 1.0)
        elif state.clean % _CLEAN_STEPS == 0:
            state.scale *= 2

    def after_step(self) -> None:
        step = self.state.step
        if step % self.config.metrics.log_every == 0:
            self.meter.tell(self.state, self.planned)
        save, validate = (
            step % self.config.checkpoint.checkpoint_every == 0,
            step % self.config.metrics.validate_every == 0,
        )
        if save or validate:
            self.report(validate, save)

    def report(self, validate: bool, save: bool) -> None:
        """Measure on held-out text, write a checkpoint, tell. The best measurement so far is always
        written.
        """
        if validate and self.job.validation and self.validated_at != self.state.step:
            improved = self.validate()
            save = save or improved
        if save:
            moment = checkpoint.snapshot(self.job.model, self.optimizer, self.state)
            if self.job.store:
                self.job.store.save(moment)
        self.job.hooks.report(self.state.metrics, self.state.step)

    def validate(self) -> bool:
        """True where the mean of the validation losses is the lowest so far."""
        self.validated_at = self.state.step
        measured = validate_at(self.loss, self.job.validation)
        self.meter.validated(self.state, measured)
        losses = [value for name, value in measured.items() if name.startswith("validation/loss_")]
        mean = sum(losses) / max(len(losses), 1)
        if not losses or not (self.state.best is None or mean < self.state.best):
            return False
        self.state.best, self.state.best_step = mean, self.state.step
        return True


def planned_steps(config: TrainConfig, per_epoch: int, workers: int) -> int:
    """About how many optimizer steps a run takes."""
    steps = (
        max(1, math.ceil(per_epoch / (workers * config.optimizer.accumulation_steps)))
        * config.optimizer.epochs
    )
    return steps if config.optimizer.max_steps is None else min(steps, config.optimizer.max_steps)


def validate_at(loss: TargetLoss, sets: Mapping[int, list[Batch]]) -> dict[str, float]:
    """Mean loss at each branch count over the same text, and the branch tax: that loss minus the loss of lone
    branches.
    """
    found = {}
    for branches, own in sorted(sets.items()):
        totals = evaluate(loss, own).everywhere(loss.device)
        if totals.targets:
            found[branches] = totals.loss / totals.targets
    taxes = {
        f"validation/branch_tax_{n}": value - found[1] for n, value in found.items() if n > 1 and 1 in found
    }
    return {f"validation/loss_{n}": value for n, value in found.items()} | taxes


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _workers() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
