"""Metrics and progress lines of a run."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping

import torch

from parallelmind.hardware import num_gpus
from parallelmind.training.checkpoint import TrainingState
from parallelmind.training.hooks import Hooks
from parallelmind.training.step import Totals


class MetricsLogger:
    """Logs means over the steps since the last line.

    The sums of these steps are part of the training state; the clock is not.
    """

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._last_time, self._tokens = time.perf_counter(), 0.0
        self._training_seconds = 0.0  # since the last line, up to _last_time
        # Of the estimate, which begins anew with the first line: its steps waited for the data to start.
        self._start, self._num_steps, self._is_warm = self._last_time, 0, False

    def add(self, state: TrainingState, totals: Totals, rate: float, norm: float) -> None:
        """Add a step; a step without a finite gradient is excluded from the means."""
        if math.isfinite(norm):
            for name in ("loss", "targets", "tokens", "padded_tokens"):
                setattr(state.window, name, getattr(state.window, name) + getattr(totals, name))
            state.metrics |= {"learning_rate": rate, "gradient_norm": norm}
        self._tokens += totals.tokens
        self._num_steps += 1

    def log(self, state: TrainingState, planned_steps: int) -> None:
        """Log the means since the last call and print a progress line, if there was a step."""
        window = state.window
        if not window.targets:
            return
        now = time.perf_counter()
        speed = self._tokens / max(self._training_seconds + now - self._last_time, 1e-9)
        state.metrics |= {
            "loss": window.loss / window.targets,
            "tokens_per_second": speed,
            "padding_share": 1 - window.tokens / window.padded_tokens,
            "skipped_steps": state.skipped_steps,
            "epoch": state.epoch,
            "branches": state.branches,
            "peak_memory_gib": peak_memory() / 2**30,
        }
        self._add_seconds(state, now)
        # The state also holds the values of the last validation, which belong to another step.
        own = {name: value for name, value in state.metrics.items() if not name.startswith("validation/")}
        self._hooks.log(own, state.step)
        self._hooks.print_line(
            f"step {state.step}/{max(planned_steps, state.step)}  loss {state.metrics['loss']:.3f}  "
            f"lr {state.metrics['learning_rate']:.1e}  {speed:.0f} tok/s  "
            f"ETA {_format_time(self._seconds_left(state.step, planned_steps, now))}"
        )
        state.window = Totals()
        self._tokens = self._training_seconds = 0.0
        if not self._is_warm:
            self._start, self._num_steps, self._is_warm = now, 0, True

    def log_validation(self, state: TrainingState, metrics: Mapping[str, float], started: float) -> None:
        """Log the metrics of a validation and print them; its time does not count for tokens per second.

        started: `time.perf_counter()` at the start of the validation.
        """
        state.metrics |= metrics
        self._training_seconds += started - self._last_time
        self._add_seconds(state, time.perf_counter())
        self._hooks.log(metrics, state.step)
        values = (f"{name.removeprefix('validation/')} {value:.3f}" for name, value in metrics.items())
        self._hooks.print_line("validation  " + "  ".join(values))

    def _seconds_left(self, step: int, planned_steps: int, now: float) -> float:
        return max(planned_steps - step, 0) * (now - self._start) / max(self._num_steps, 1)

    def _add_seconds(self, state: TrainingState, now: float) -> None:
        """Add the time since the last call to the metric `seconds`, which covers all restarts of a run."""
        state.metrics["seconds"] = state.metrics.get("seconds", 0.0) + now - self._last_time
        self._last_time = now


def peak_memory() -> int:
    """Peak memory of this process in bytes: on its GPU, or in main memory without one."""
    if num_gpus():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _format_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
