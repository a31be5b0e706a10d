"""The objective over two swept fields."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from workloads.sweep.plots.colors import VIRIDIS
from workloads.sweep.plots.values import (
    PlotValue,
    finished_with,
    format_label,
    needs_log_scale,
    setting_value,
    sorted_values,
    varied_fields,
)
from workloads.sweep.trial import Trial

# A field with more values is not drawn: a continuous search has one value per trial and most cells are empty.
_MAX_VALUES = 12


def heat_map(trials: Sequence[Trial], objective: str) -> Figure | None:
    """Mean objective over `rope_2d_ratio` and `lora_rank` if both were swept, else the most varied fields."""
    values = {
        field: sorted_values(setting_value(trial, field) for trial in trials)
        for field in varied_fields(trials)
    }
    fields = _choose_fields(values)
    if fields is None or not (cells := _cell_means(trials, fields, objective)):
        return None
    x_values, y_values = (values[field] for field in fields)
    figure = Figure(figsize=(2.6 + 0.85 * len(x_values), 1.9 + 0.5 * len(y_values)), layout="constrained")
    axes = figure.add_subplot(xlabel=fields[0], ylabel=fields[1])
    norm_type = LogNorm if needs_log_scale(cells.values()) else Normalize
    norm = norm_type(min(cells.values()), max(cells.values()))
    # The hatched background shows through in cells without a finished trial.
    axes.patch.set(hatch="////", edgecolor="#cccccc", facecolor="white")
    grid = [[cells.get((x, y), math.nan) for x in x_values] for y in y_values]
    image = axes.imshow(grid, cmap=VIRIDIS, norm=norm, origin="lower", aspect="auto")
    for (x, y), mean in cells.items():
        position = (x_values.index(x), y_values.index(y))
        color = "white" if norm(mean) < 0.6 else "black"
        axes.text(*position, f"{mean:#.4g}", ha="center", va="center", size=9, color=color)
    rotation = 30 * isinstance(x_values[-1], str)
    axes.set_xticks(range(len(x_values)), map(format_label, x_values), rotation=rotation)
    axes.set_yticks(range(len(y_values)), map(format_label, y_values))
    figure.colorbar(image, label=objective)
    return figure


def _choose_fields(values: dict[str, list[PlotValue]]) -> tuple[str, str] | None:
    """The fields of the x and y axis; None if fewer than two fields have few enough values."""
    fields = [field for field in values if len(values[field]) <= _MAX_VALUES]
    if {"rope_2d_ratio", "lora_rank"} <= set(fields):
        return "rope_2d_ratio", "lora_rank"
    fields.sort(key=lambda field: -len(values[field]))
    return (fields[0], fields[1]) if len(fields) > 1 else None


def _cell_means(
    trials: Sequence[Trial], fields: Sequence[str], objective: str
) -> dict[tuple[PlotValue, ...], float]:
    """Mean objective of the finished trials by their values of the fields."""
    cells: dict[tuple[PlotValue, ...], list[float]] = {}
    for trial in finished_with(trials, objective):
        key = tuple(setting_value(trial, field) for field in fields)
        cells.setdefault(key, []).append(trial.metrics[objective])
    return {key: fmean(objectives) for key, objectives in cells.items()}
