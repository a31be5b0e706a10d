"""What a run shows of itself: a line and a set of metrics every few steps."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from parallelmind.training.checkpoint import State
from parallelmind.training.step import Totals

if TYPE_CHECKING:
    from parallelmind.training.loop import Hooks


class MetricsLogger:
    """Sums of the steps since the last line, which live in the state, and the clock, which doesn't."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._since, self._tokens = time.perf_counter(), 0.0
        self._warm: tuple[float, int] | None = (
            None  # since when, and which step: the first one waits for the data to start
        )

    def add(self, state: State, totals: Totals, rate: float, norm: float) -> None:
        """Count a step; one without a finite gradient must not turn the whole line into nan."""
        if math.isfinite(norm):
            for name in ("loss", "targets", "tokens", "places"):
                setattr(state.window, name, getattr(state.window, name) + getattr(totals, name))
            state.metrics |= {"learning_rate": rate, "gradient_norm": norm}
        self._tokens += totals.tokens
        self._warm = self._warm or (time.perf_counter(), state.step)

    def tell(self, state: State, planned: int) -> None:
        """Log and say the means since the last time, if there was a step."""
        window = state.window
        if not window.targets:
            return
        now = time.perf_counter()
        speed = self._tokens / max(now - self._since, 1e-9)
        state.metrics |= {
            "loss": window.loss / window.targets,
            "tokens_per_second": speed,
            "padding_share": 1 - window.tokens / window.places,
            "skipped_steps": state.skipped,
            "epoch": state.epoch,
            "branches": state.branches,
            "peak_memory_gib": peak_memory() / 2**30,
        }
        self._count_seconds(state, now)
        self._hooks.log(state.metrics, state.step)
        since, first = self._warm or (self._since, state.step - 1)
        left = max(planned - state.step, 0) * (now - since) / max(state.step - first, 1)
        loss, rate = state.metrics["loss"], state.metrics["learning_rate"]
        self._hooks.say(
            f"step {state.step}/{max(planned, state.step)}  loss {loss:.3f}  lr {rate:.1e}  {speed:.0f} tok/s  ETA {_clock(left)}"
        )
        state.window = Totals()
        self._tokens = 0.0

    def _count_seconds(self, state: State, now: float) -> None:
        """Of training and validating, in all starts of a run together."""
        state.metrics["seconds"] = state.metrics.get("seconds", 0.0) + now - self._since
        self._since = now

    def validated(self, state: State, measured: Mapping[str, float]) -> None:
        """Log and say a validation, whose time does not count as training."""
        state.metrics |= measured
        self._count_seconds(state, time.perf_counter())
        self._hooks.log(measured, state.step)
        shown = (f"{name.removeprefix('validation/')} {value:.3f}" for name, value in measured.items())
        self._hooks.say("validation  " + "  ".join(shown))
        self._tokens = 0.0


def peak_memory() -> int:
    """Bytes: the most that this process has held on its GPU, or without one in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
