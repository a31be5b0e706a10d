"""How a sweep shows itself while it runs: a live table on a terminal, a line for each event elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from workloads.sweep.config import SweepConfig
from workloads.sweep.journal import Journal
from workloads.sweep.trial import Trial

_STYLES = {"finished": "green", "stopped": "yellow", "failed": "red", "running": "bold"}


class View:
    """Call `show` whenever the journal has changed."""

    def __init__(self, config: SweepConfig, journal: Journal, planned: int | None, slots: int) -> None:
        """planned: trials in all, None where that is not known."""
        self._config, self._journal, self._planned, self._slots = config, journal, planned, slots
        self._began, self._done = time.monotonic(), sum(trial.ended for trial in journal.trials.values())
        self._told: dict[int, tuple[str, int]] = {
            trial.number: _state(trial) for trial in journal.trials.values()
        }
        self._live = Live(console=Console(), refresh_per_second=2) if sys.stdout.isatty() else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
            self.show()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self) -> None:
        trials = list(self._journal.trials.values())
        if self._live:
            self._live.update(self._table(trials))
            return
        for trial in trials:
            if self._told.get(trial.number) != _state(trial):
                self._told[trial.number] = _state(trial)
                print(self._line(trial, trials), flush=True)

    def _table(self, trials: list[Trial]) -> Table:
        table = Table(title=f"{self._config.name}: {self._summary(trials)}", title_justify="left")
        for header in ("trial", "settings", "", "step", *self._config.metrics, "time"):
            table.add_column(header, overflow="fold")
        for trial in trials:
            values = [
                f"{trial.metrics[name]:.3f}" if name in trial.metrics else "" for name in self._config.metrics
            ]
            cells = [
                str(trial.number),
                trial.describe(),
                trial.status,
                str(trial.step or ""),
                *values,
                _clock(trial.seconds),
            ]
            table.add_row(*cells, style=_STYLES.get(trial.status))
        return table

    def _line(self, trial: Trial, trials: list[Trial]) -> str:
        values = "  ".join(
            f"{name.removeprefix('validation/')} {trial.metrics[name]:.3f}" for name in self._shown(trial)
        )
        parts = [
            f"trial {trial.number}",
            trial.describe(),
            trial.status,
            f"step {trial.step}" if trial.step else "",
            values,
        ]
        if trial.ended:
            parts.append(f"[{self._summary(trials)}]")
        return "  ".join(filter(None, [*parts, trial.error]))

    def _shown(self, trial: Trial) -> list[str]:
        return [name for name in self._config.metrics if name in trial.metrics]

    def _summary(self, trials: list[Trial]) -> str:
        """How many are over, and how long the rest will take if it takes as long as those of this start."""
        over = sum(trial.ended for trial in trials)
        told = f"{over} of {self._planned or '?'} over"
        failed = sum(trial.status == "failed" for trial in trials)
        told += f", {failed} failed" if failed else ""
        if self._planned and over > self._done:
            left = (time.monotonic() - self._began) / (over - self._done) * (self._planned - over)
            told += f", ETA {_clock(left)}"
        return told


def _state(trial: Trial) -> tuple[str, int]:
    return trial.status, trial.step


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
