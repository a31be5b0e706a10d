"""Progress of a sweep: a live table on a terminal, one line per event elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from workloads.sweep.journal import Journal
from workloads.sweep.trial import Trial

_STYLES = {"finished": "green", "stopped": "yellow", "failed": "red", "running": "bold"}


class ProgressView:
    """Shows the trials of a journal. Call `update` after each event of a trial."""

    def __init__(self, name: str, metrics: list[str], journal: Journal, planned: int) -> None:
        """planned: number of trials of the whole sweep."""
        self._name, self._metrics, self._journal, self._planned = name, metrics, journal, planned
        self._started_at = time.monotonic()
        self._ended_before = sum(trial.ended for trial in journal.trials.values())
        self._shown_states = {trial.number: _state(trial) for trial in journal.trials.values()}
        self._shown_restarts = {trial.number: len(trial.restarts) for trial in journal.trials.values()}
        is_terminal = sys.stdout.isatty()
        self._live = Live(console=Console(), get_renderable=self._table) if is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
            for trial in self._journal.trials.values():
                if trial.error:
                    print(f"trial {trial.number} failed: {trial.error}", flush=True)

    def update(self, number: int) -> None:
        """Print what is new of a trial: its restarts, and its status or step unless a table shows them."""
        trial = self._journal.trials[number]
        for line in trial.restarts[self._shown_restarts.get(number, 0) :]:
            print(f"trial {number}  {trial.describe()}  {line}", flush=True)
        self._shown_restarts[number] = len(trial.restarts)
        if not self._live and self._shown_states.get(number) != _state(trial):
            self._shown_states[number] = _state(trial)
            print(self._line(trial), flush=True)

    def _table(self) -> Table:
        table = Table(title=f"{self._name}: {self._summary()}", title_justify="left")
        for header in ("trial", "", *self._metrics, "settings", "step", "time"):
            table.add_column(header, overflow="fold")
        for trial in list(self._journal.trials.values()):
            table.add_row(
                str(trial.number),
                trial.status,
                *(f"{trial.metrics[name]:.3f}" if name in trial.metrics else "" for name in self._metrics),
                trial.describe(),
                str(trial.step or ""),
                _format_duration(trial.seconds),
                style=_STYLES.get(trial.status),
            )
        return table

    def _line(self, trial: Trial) -> str:
        parts = [
            f"trial {trial.number}",
            trial.describe(),
            trial.status,
            f"step {trial.step}" if trial.step else "",
            format_metrics(trial, [name for name in self._metrics if name in trial.metrics]),
            f"[{self._summary()}]" if trial.ended else "",
            trial.error or "",
        ]
        return "  ".join(filter(None, parts))

    def _summary(self) -> str:
        """Counts and ETA, which assumes that the remaining trials take as long as those of this start."""
        trials = list(self._journal.trials.values())
        ended = sum(trial.ended for trial in trials)
        failed = sum(trial.status == "failed" for trial in trials)
        summary = f"{ended} of {self._planned} ended"
        if failed:
            summary += f", {failed} failed"
        if ended > self._ended_before:
            seconds_per_trial = (time.monotonic() - self._started_at) / (ended - self._ended_before)
            summary += f", ETA {_format_duration(seconds_per_trial * (self._planned - ended))}"
        return summary


def format_metrics(trial: Trial, names: list[str]) -> str:
    """`loss_1 2.345  branch_tax_8 0.012`."""
    return "  ".join(f"{name.removeprefix('validation/')} {trial.metrics[name]:.3f}" for name in names)


def _state(trial: Trial) -> tuple[str, int]:
    return trial.status, trial.step


def _format_duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
