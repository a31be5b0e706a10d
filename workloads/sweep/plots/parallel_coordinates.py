"""Every trial as a line through its settings to its objective."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workloads.sweep.plots.colors import GREY, VIRIDIS
from workloads.sweep.plots.values import (
    PlotValue,
    finished_with,
    format_label,
    metric_value,
    needs_log_scale,
    setting_value,
    sorted_values,
    varied_fields,
)
from workloads.sweep.trial import Trial

_MIN_TICK_GAP = 0.06  # share of an axis' height; labels of closer ticks would overlap
# Behind tick labels, so that they can be read across lines.
_LABEL_BOX = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}


def parallel_coordinates(trials: Sequence[Trial], objective: str) -> Figure | None:
    """One axis per varied field and the objective last; one line per trial, colored by its objective.

    Stopped and failed trials are dashed grey lines. The best trial is drawn on top.
    """
    fields, finished = varied_fields(trials), finished_with(trials, objective)
    if not fields or not finished:
        return None
    unfinished = [trial for trial in trials if trial.status in ("stopped", "failed")]
    drawn = [*unfinished, *sorted(finished, key=lambda trial: -trial.metrics[objective])]
    axis_heights = [_heights(setting_value(trial, field) for trial in drawn) for field in fields]
    objectives = [metric_value(trial, objective) for trial in drawn]
    axis_heights.append(_heights(value for value in objectives if value is not None))
    figure = Figure(figsize=(max(7.0, 1.9 * len(axis_heights)), 5), layout="constrained")
    axes = figure.add_subplot(xlim=(-0.5, len(axis_heights) - 0.5), ylim=(-0.04, 1.06))
    for index, (trial, reached) in enumerate(zip(drawn, objectives, strict=True)):
        values: list[PlotValue | None] = [*(setting_value(trial, field) for field in fields), reached]
        line = [
            heights[value] for heights, value in zip(axis_heights, values, strict=True) if value is not None
        ]
        if index < len(unfinished):
            axes.plot(line, color=GREY, linewidth=0.7, linestyle="--")
        else:
            axes.plot(line, color=VIRIDIS(line[-1]), linewidth=1.6, alpha=0.85)
    for x, (name, heights) in enumerate(zip([*fields, objective], axis_heights, strict=True)):
        _draw_axis(axes, x, name, heights, labels_right=name == objective)
    axes.axis("off")
    return figure


def _heights(values: Iterable[PlotValue]) -> dict[PlotValue, float]:
    """The height of each value on its axis, 0 to 1: numbers to scale, categories evenly spaced."""
    ordered = sorted_values(values)
    numbers = [value for value in ordered if isinstance(value, float)]
    if len(numbers) < len(ordered):
        numbers = [float(index) for index in range(len(ordered))]
    elif needs_log_scale(numbers):
        numbers = [math.log(number) for number in numbers]
    low, span = min(numbers), max(numbers) - min(numbers)
    return {
        value: (number - low) / span if span else 0.5 for value, number in zip(ordered, numbers, strict=True)
    }


def _draw_axis(axes: Axes, x: int, name: str, heights: dict[PlotValue, float], labels_right: bool) -> None:
    """A vertical line with its name above and as many value labels as there is room for."""
    shift, alignment = (0.04, "left") if labels_right else (-0.04, "right")
    axes.plot([x, x], [0, 1], color="black", linewidth=1, zorder=3)
    axes.text(x, 1.04, name, ha="center", va="bottom", size=9, weight="bold")
    last_label = -1.0
    for value, height in heights.items():
        if height - last_label >= _MIN_TICK_GAP and (height == 1 or 1 - height >= _MIN_TICK_GAP):
            last_label = height
            label = format_label(value)
            axes.text(x + shift, height, label, ha=alignment, va="center", size=8, bbox=_LABEL_BOX, zorder=4)
