"""A sweep's report: one self-contained HTML page, its plots as PNG files, and the table of trials."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from parallelmind.storage import atomic_binary_file, atomic_file
from workloads.sweep.plots.cost_vs_quality import cost_vs_quality
from workloads.sweep.plots.heat_map import heat_map
from workloads.sweep.plots.loss_vs_branches import loss_vs_branches
from workloads.sweep.plots.parallel_coordinates import parallel_coordinates
from workloads.sweep.plots.values import metric_value
from workloads.sweep.trial import END_STATUSES, Status, Trial
from workloads.sweep.trial_files import CommandOf, replace_surrogates, setting_names, write_trial_files

_DPI = 144
_CAPTIONS = {
    "loss_vs_branches": "Loss against number of branches: means of n finished trials, with a band from the "
    "lowest to the highest. A flat line pays no branch tax.",
    "heat_map": "Mean of the finished trials over seeds and all other swept fields. "
    "Hatched: no trial finished there.",
    "parallel_coordinates": "Every trial as a line through its settings to its objective; dark is low, and "
    "low is good. Dashed grey: stopped early or failed.",
    "cost_vs_quality": "Objective against training time, with the numbers of the trials. "
    "No finished trial is both cheaper and better than one on the front.",
}


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot in the page."""

    name: str
    png: bytes

    @property
    def caption(self) -> str:
        return _CAPTIONS[self.name]

    @property
    def base64_png(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the page's table."""

    css_class: str
    cells: list[str]


def write_report(
    folder: Path,
    title: str,
    trials: Sequence[Trial],
    metrics: Sequence[str],
    winner: int | None,
    command_of: CommandOf,
) -> Path:
    """Write page, plots and table into `folder`, each file atomically; returns the page's path.

    metrics: the objectives, lower is better; the plots show the first. winner: the number of a trial.
    command_of: returns the command that trains a trial again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_trial_files(folder, trials, metrics, command_of)
    best = next((trial for trial in trials if trial.number == winner), None)
    page = _template().render(
        title=title,
        counts=_count_statuses(trials),
        winner=best,
        winner_metrics=_format_metrics(best, metrics) if best else "",
        columns=["trial", "status", *metrics, *setting_names(trials), "step", "seconds"],
        rows=_table_rows(trials, metrics, winner),
        plots=_write_plots(folder, trials, metrics[0]),
        failed=[trial for trial in trials if trial.status == "failed"],
        trials=trials,
        command_of=command_of,
    )
    with atomic_file(folder / "report.html") as file:
        file.write(replace_surrogates(page))
    return folder / "report.html"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html")


def _write_plots(folder: Path, trials: Sequence[Trial], objective: str) -> list[Plot]:
    """Write a PNG file for each plot, and remove files of an earlier report whose plot is now empty."""
    figures: dict[str, Figure | None] = {
        "loss_vs_branches": loss_vs_branches(trials),
        "heat_map": heat_map(trials, objective),
        "parallel_coordinates": parallel_coordinates(trials, objective),
        "cost_vs_quality": cost_vs_quality(trials, objective),
    }
    plots = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI)
        with atomic_binary_file(path) as file:
            file.write(buffer.getvalue())
        plots.append(Plot(name, buffer.getvalue()))
    return plots


def _count_statuses(trials: Sequence[Trial]) -> str:
    """The number of trials of each status; end statuses are listed even with a count of zero."""
    counts = Counter(trial.status for trial in trials)
    unended: tuple[Status, ...] = ("waiting", "running")
    listed = [*END_STATUSES, *(status for status in unended if counts[status])]
    names = {"stopped": "stopped early"}
    parts = ", ".join(f"{counts[status]} {names.get(status, status)}" for status in listed)
    return f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'}: {parts}."


def _table_rows(trials: Sequence[Trial], metrics: Sequence[str], winner: int | None) -> list[Row]:
    """The rows by the first objective, best first; trials without one come last."""
    ranked = sorted(trials, key=lambda trial: _rank(trial, metrics[0]))
    return [_table_row(trial, setting_names(trials), metrics, trial.number == winner) for trial in ranked]


def _table_row(trial: Trial, settings: Sequence[str], metrics: Sequence[str], is_winner: bool) -> Row:
    cells = [
        str(trial.number),
        f"{trial.status} ★" if is_winner else trial.status,
        *(_format_metric(trial, name) for name in metrics),
        *(_format_setting(trial.settings.get(name)) for name in settings),
        str(trial.step),
        f"{trial.seconds:,.0f}",
    ]
    return Row("winner" if is_winner else trial.status, cells)


def _rank(trial: Trial, objective: str) -> tuple[bool, float, int]:
    value = metric_value(trial, objective) if trial.status == "finished" else None
    return (value is None, value or 0.0, trial.number)


def _format_metrics(trial: Trial, metrics: Sequence[str]) -> str:
    return ", ".join(f"{name} {_format_metric(trial, name)}" for name in metrics)


def _format_metric(trial: Trial, name: str) -> str:
    """Five significant digits, trailing zeros included, so that a column lines up."""
    value = trial.metrics.get(name)
    return "–" if value is None else f"{value:#.5g}"


def _format_setting(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
