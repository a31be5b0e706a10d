"""The objective against training time."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from workloads.sweep.plots.colors import BLUE, GREY, RED
from workloads.sweep.plots.values import finished_with, metric_value, needs_log_scale
from workloads.sweep.trial import Trial


def cost_vs_quality(trials: Sequence[Trial], objective: str) -> Figure | None:
    """The objective of each trial against its seconds in training, with the Pareto front."""
    finished = [trial for trial in finished_with(trials, objective) if trial.seconds > 0]
    if len(finished) < 2:
        return None
    stopped = [
        trial
        for trial in trials
        if trial.status == "stopped" and trial.seconds > 0 and metric_value(trial, objective) is not None
    ]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds in training", ylabel=objective, xscale="log")
    _draw_points(axes, stopped, objective, "stopped early" if stopped else "", face="none", edge=GREY)
    _draw_points(axes, finished, objective, "finished", face=BLUE, edge=BLUE)
    _draw_front(axes, finished, objective)
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter())
    drawn = [trial.metrics[objective] for trial in (*finished, *stopped)]
    axes.set_yscale("log" if needs_log_scale(drawn) else "linear")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


def _draw_points(
    axes: Axes, trials: Sequence[Trial], objective: str, label: str, face: str, edge: str
) -> None:
    """One dot per trial with its number beside it."""
    x, y = [trial.seconds for trial in trials], [trial.metrics[objective] for trial in trials]
    axes.scatter(x, y, s=28, facecolors=face, edgecolors=edge, label=label, zorder=3)
    for trial in trials:
        position = (trial.seconds, trial.metrics[objective])
        axes.annotate(str(trial.number), position, (4, 4), textcoords="offset points", size=8)


def _draw_front(axes: Axes, trials: Sequence[Trial], objective: str) -> None:
    """Steps from one trial of the Pareto front to the next, up to the longest training time."""
    front = _pareto_front(trials, objective)
    x = [*(trial.seconds for trial in front), max(trial.seconds for trial in trials)]
    y = [trial.metrics[objective] for trial in (*front, front[-1])]
    axes.step(x, y, where="post", color=RED, label="Pareto front")


def _pareto_front(trials: Sequence[Trial], objective: str) -> list[Trial]:
    """The trials that are better than every cheaper one, by seconds."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.seconds, trial.metrics[objective])):
        if not front or trial.metrics[objective] < front[-1].metrics[objective]:
            front.append(trial)
    return front
