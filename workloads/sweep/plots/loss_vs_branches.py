"""Held-out loss against the number of branches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean
from textwrap import fill

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from workloads.sweep.plots.colors import VIRIDIS
from workloads.sweep.plots.values import (
    MISSING,
    PlotValue,
    format_label,
    metric_value,
    needs_log_scale,
    setting_value,
    varied_fields,
)
from workloads.sweep.trial import Trial

LossLine = dict[int, list[float]]  # number of branches -> losses of the trials that the line stands for

_LOSS_METRIC = re.compile(r"validation/loss_(\d+)")
_MIN_RANGE = 0.1  # nats on the axis of losses
_MAX_LEGEND_LINES = 12
_LEGEND_CHARS = 105  # width of the legend


def loss_vs_branches(trials: Sequence[Trial]) -> Figure | None:
    """Held-out loss of the finished trials against the number of branches."""
    finished = [trial for trial in trials if trial.status == "finished"]
    lines = _loss_lines(finished, varied_fields(trials))
    if not lines or len(branch_counts := list(lines[0][1])) < 2:
        return None
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="branches in the sample", ylabel="held-out loss (nats per target token)")
    if len(lines) > _MAX_LEGEND_LINES:
        _draw_colored_by_tax(figure, axes, [line for _, line in lines])
    else:
        _draw_with_legend(figure, axes, lines)
    axes.set_xscale("log", base=2)
    axes.set_xticks(branch_counts, labels=[str(count) for count in branch_counts])
    axes.minorticks_off()
    all_losses = [loss for _, line in lines for losses in line.values() for loss in losses]
    _widen(axes)
    axes.set_yscale("log" if needs_log_scale(all_losses) else "linear")
    axes.grid(alpha=0.3)
    return figure


def _widen(axes: Axes) -> None:
    """Show at least `_MIN_RANGE` nats, so that a small branch tax looks small."""
    low, high = axes.get_ylim()
    missing = max(_MIN_RANGE - (high - low), 0) / 2
    axes.set_ylim(low - missing, high + missing)


def _loss_lines(trials: Sequence[Trial], fields: Sequence[str]) -> list[tuple[str, LossLine]]:
    """One labelled line per point; with more points than a legend holds, one per `rope_2d_ratio`.

    A trial that lacks the loss at some number of branches is omitted: the means of one line would cover
    different trials.
    """
    points = {tuple(setting_value(trial, field) for field in fields) for trial in trials}
    if "rope_2d_ratio" in fields and len(points) > _MAX_LEGEND_LINES:
        fields = ["rope_2d_ratio"]
    metric_of = {
        int(match[1]): name
        for trial in trials
        for name in trial.metrics
        if (match := _LOSS_METRIC.fullmatch(name))
    }
    lines: dict[tuple[PlotValue, ...], LossLine] = {}
    for trial in trials:
        if metric_of and all(metric_value(trial, name) is not None for name in metric_of.values()):
            key = tuple(setting_value(trial, field) for field in fields)
            line = lines.setdefault(key, {count: [] for count in sorted(metric_of)})
            for count in line:
                line[count].append(trial.metrics[metric_of[count]])
    keys = sorted(lines, key=lambda key: [(isinstance(value, str), value) for value in key])
    return [(_line_label(fields, key, lines[key]), lines[key]) for key in keys]


def _line_label(fields: Sequence[str], values: Sequence[PlotValue], line: LossLine) -> str:
    settings = [
        f"{field}={format_label(value)}"
        for field, value in zip(fields, values, strict=True)
        if value != MISSING
    ]
    trial_count = len(next(iter(line.values())))
    return fill(", ".join([*settings, f"n = {trial_count}"]), _LEGEND_CHARS)


def _draw_with_legend(figure: Figure, axes: Axes, lines: Sequence[tuple[str, LossLine]]) -> None:
    """Draw the mean losses, each with a band from the lowest to the highest loss."""
    for index, (name, line) in enumerate(lines):
        color = colormaps["turbo"](0.08 + 0.84 * index / max(1, len(lines) - 1))
        means, lows, highs = ([reduce(losses) for losses in line.values()] for reduce in (fmean, min, max))
        axes.plot(list(line), means, color=color, marker="osD^v<>pPX*h"[index], ms=5, label=name)
        axes.fill_between(list(line), lows, highs, color=color, alpha=0.12, linewidth=0)
    columns = max(1, min(4, _LEGEND_CHARS // max(len(name) for name, _ in lines)))
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _draw_colored_by_tax(figure: Figure, axes: Axes, lines: Sequence[LossLine]) -> None:
    """Draw the mean losses, colored by their rise from the fewest to the most branches."""
    means_of_lines = [[fmean(losses) for losses in line.values()] for line in lines]
    taxes = [means[-1] - means[0] for means in means_of_lines]
    norm = Normalize(min(taxes), max(taxes))
    for tax, means in sorted(zip(taxes, means_of_lines, strict=True), reverse=True):
        axes.plot(list(lines[0]), means, color=VIRIDIS(norm(tax)), marker="o", ms=3, linewidth=1)
    label = "branch tax: loss at the most minus at the fewest branches"
    figure.colorbar(ScalarMappable(norm, VIRIDIS), ax=axes, label=label)
