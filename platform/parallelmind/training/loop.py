"""The training loop of one worker. It knows no Ray: batches come from a function and everything outward goes to hooks.

All workers decide alike, because each decision (the data has ended, stop, skip this step) rests on sums over all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from peft import PeftModel

from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from parallelmind.layout import Batch
from parallelmind.model.structure import causal_lm
from parallelmind.training import checkpoint
from parallelmind.training.checkpoint import State
from parallelmind.training.step import Totals, backward, learning_rate, make_optimizer, measure, update

Save = Callable[[Path], None]


class Hooks(Protocol):
    """What the loop tells the outside, on every worker alike."""

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def say(self, line: str) -> None: ...

    def report(self, metrics: Mapping[str, float], step: int, save: Save | None) -> None:
        """At validations and checkpoints; `save` writes a checkpoint folder and is None where none is due."""

    def should_stop(self) -> bool: ...


@dataclass(slots=True)
class Job:
    """What `train` works on. batches: this worker's turns of an epoch's batches, from the given one on. planned: about how
    many optimizer steps.

    validation: this worker's share of the held-out batches, by branches per sample.
    """

    config: TrainConfig
    model: PeftModel
    batches: Callable[[int, int], Iterable[Batch]]
    hooks: Hooks
    planned: int
    validation: Mapping[int, list[Batch]]
    run_id: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """finished: false where a stop was asked for. metrics: the last ones."""

    finished: bool
    step: int
    metrics: dict[str, float]


def train(job: Job, resume: Path | None = None) -> Outcome:
    """Train to the end, or until a hook asks to stop; either way the last report carries a checkpoint.

    Raises UserError if the data gives no target at all.
    """
    run = _Run(job, resume)
    while run.state.epoch < job.config.epochs and not run.ended:
        run.epoch()
    if not run.stopped and run.state.step == run.state.skipped:
        raise UserError("data_path: no step had a finite loss on any target; check answer_offset, the limits and learning_rate")
    run.log()  # the steps since the last line
    run.report(run.metrics, validate=not run.stopped, save=True)
    return Outcome(not run.stopped, run.state.step, run.metrics)


class _Run:
    """The moving parts: optimizer, position and what was measured since the last log line."""

    def __init__(self, job: Job, resume: Path | None) -> None:
        self.job, self.config, self.model = job, job.config, job.model
        if self.config.gradient_checkpointing:
            causal_lm(job.model).activation_checkpointing_enable()
        self.model.train()
        self.optimizer = make_optimizer(job.model, job.config)
        self.state = State(job.config.fingerprint(), job.run_id)
        if resume is not None:
            self.state = checkpoint.load(resume, job.model, self.optimizer)
        self.device = next(job.model.parameters()).device
        self.metrics: dict[str, float] = {}
        self.stopped = False
        self.window, self.window_start = Totals(), time.perf_counter()
        self.warm: tuple[float, int] | None = None  # since when, and which step: the first one waits for the data to start

    @property
    def ended(self) -> bool:
        return self.stopped or (self.config.max_steps is not None and self.state.step >= self.config.max_steps)

    def epoch(self) -> None:
        stream = iter(self.job.batches(self.state.epoch, self.state.batches))
        while not self.ended:
            if not self.step(stream):
                self.state.epoch, self.state.batches = self.state.epoch + 1, 0
                return

    def step(self, stream: Iterator[Batch]) -> bool:
        """One optimizer step; false where no worker has data left."""
        torch.manual_seed(hash((self.config.seed, self.state.step, _rank())) % 2**63)  # dropout, the same after a restart
        own = backward(self.model, stream, self.config.accumulation_steps, self.config.visibility)
        own.stop = float(self.job.hooks.should_stop())
        totals = own.everywhere(self.device)
        self.stopped = totals.stop > 0
        if not totals.batches:
            return False
        rate = learning_rate(self.config, self.state.step, self.job.planned)
        norm = self.apply(totals, rate)
        self.state.step += 1
        self.state.batches += int(totals.batches)
        self.state.branches += int(totals.branches)
        self.after_step(totals, rate, norm)
        self.warm = self.warm or (time.perf_counter(), self.state.step)
        return True

    def apply(self, totals: Totals, rate: float) -> float:
        """Move the weights, unless there is no target or no finite gradient: such a step is counted and left out."""
        if not totals.targets or not math.isfinite(totals.loss):
            self.optimizer.zero_grad(set_to_none=True)
            norm = math.nan
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            norm = update(self.model, self.optimizer, totals.targets, self.config.gradient_clip)
        if not math.isfinite(norm):
            self.state.skipped += 1
            self.job.hooks.say(f"step {self.state.step + 1}: no finite gradient over {totals.targets:.0f} targets; step left out")
        return norm

    def after_step(self, totals: Totals, rate: float, norm: float) -> None:
        if math.isfinite(norm):  # one bad step must not turn the whole line into nan
            for name in ("loss", "targets", "tokens", "places"):
                setattr(self.window, name, getattr(self.window, name) + getattr(totals, name))
            self.metrics |= {"learning_rate": rate, "gradient_norm": norm}
        step = self.state.step
        if step % self.config.log_every == 0:
            self.log()
        save, validate = step % self.config.checkpoint_every == 0, step % self.config.validate_every == 0
        if (save or validate) and not self.ended:
            self.report(self.metrics, validate, save)

    def log(self) -> None:
        if not self.window.targets:
            return
        now = time.perf_counter()
        window, speed = self.window, self.window.tokens / max(now - self.window_start, 1e-9)
        self.metrics |= {
            "loss": window.loss / window.targets,
            "tokens_per_second": speed,
            "padding_share": 1 - window.tokens / window.places,
            "skipped_steps": self.state.skipped,
            "epoch": self.state.epoch,
            "branches": self.state.branches,
        }
        self.job.hooks.log(self.metrics, self.state.step)
        since, first = self.warm or (self.window_start, self.state.step - 1)
        left = max(self.job.planned - self.state.step, 0) * (now - since) / max(self.state.step - first, 1)
        loss, rate, planned = self.metrics["loss"], self.metrics["learning_rate"], max(self.job.planned, self.state.step)
        self.job.hooks.say(
            f"step {self.state.step}/{planned}  loss {loss:.3f}  lr {rate:.1e}  {speed:.0f} tok/s  ETA {_clock(left)}"
        )
        self.window, self.window_start = Totals(), now

    def report(self, metrics: dict[str, float], validate: bool, save: bool) -> None:
        if validate and self.job.validation:
            measured = validate_at(self.model, self.job.validation, self.config, self.device)
            metrics |= measured
            self.job.hooks.log(measured, self.state.step)
            shown = (f"{name.removeprefix('validation/')} {value:.3f}" for name, value in measured.items())
            self.job.hooks.say("validation  " + "  ".join(shown))
            self.window_start = time.perf_counter()
        self.job.hooks.report(metrics, self.state.step, self.save if save else None)

    def save(self, folder: Path) -> None:
        checkpoint.save(folder, self.model, self.optimizer, self.state)


def validate_at(
    model: PeftModel, sets: Mapping[int, list[Batch]], config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Mean loss at each branch count over the same text, and the branch tax: that loss minus the loss of lone branches."""
    found = {}
    for branches, own in sorted(sets.items()):
        totals = measure(model, own, config.visibility).everywhere(device)
        if totals.targets:
            found[branches] = totals.loss / totals.targets
    taxes = {f"validation/branch_tax_{n}": loss - found[1] for n, loss in found.items() if n > 1 and 1 in found}
    return {f"validation/loss_{n}": loss for n, loss in found.items()} | taxes


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
