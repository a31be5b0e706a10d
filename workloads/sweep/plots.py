"""The pictures of a sweep's report. Each function returns None where its picture would say nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from statistics import fmean
from textwrap import fill

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from workloads.sweep.trial_table import Trial
from workloads.sweep.values import MISSING, Value, in_order, label, measured, setting, varied, wants_log

Line = dict[int, list[float]]  # branches -> the losses of the trials that it stands for

_LOSS = re.compile(r"validation/loss_(\d+)")
_NAMED_LINES = 12  # more do not fit into a legend
# values of a field in the heat map; a continuous search has a value per trial and would leave it empty
_MOST_ROWS = 12
_TICK_GAP = 0.06  # of an axis' height: closer ticks would overlap
_LEGEND_WIDTH = 105  # characters
_COLOURS = colormaps["viridis"]  # dark is low, and low is good
_BOX = {
    "facecolor": "white",
    "alpha": 0.75,
    "edgecolor": "none",
    "pad": 0.8,
}  # behind text, so that lines let it be read
_GREY, _DOT, _FRONT = "#8a8a8a", "#31688e", "#d1495b"


def loss_vs_branches(trials: Sequence[Trial]) -> Figure | None:
    """Held-out loss of the finished trials against the number of branches that they were measured at."""
    lines = _lines([trial for trial in trials if trial.status == "finished"], varied(trials))
    if not lines or len(counts := list(lines[0][1])) < 2:
        return None
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot(xlabel="branches in the sample", ylabel="held-out loss (nats per target token)")
    if len(lines) > _NAMED_LINES:
        _draw_by_tax(figure, axes, [line for _, line in lines])
    else:
        _draw_named(figure, axes, lines)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, labels=[str(count) for count in counts])
    axes.minorticks_off()
    every = [loss for _, line in lines for losses in line.values() for loss in losses]
    axes.set_yscale("log" if wants_log(every) else "linear")
    axes.grid(alpha=0.3)
    return figure


def _lines(trials: Sequence[Trial], fields: Sequence[str]) -> list[tuple[str, Line]]:
    """One line per point, with what tells it from the others; of more points than can be named, one per
    `rope_2d_ratio`.

    A trial without a loss at every number of branches is left out: the means would be of different trials.
    """
    points = {tuple(setting(trial, field) for field in fields) for trial in trials}
    fields = ["rope_2d_ratio"] if "rope_2d_ratio" in fields and len(points) > _NAMED_LINES else fields
    names = {
        int(found[1]): name for trial in trials for name in trial.metrics if (found := _LOSS.fullmatch(name))
    }
    lines: dict[tuple[Value, ...], Line] = {}
    for trial in trials:
        if names and all(measured(trial, name) is not None for name in names.values()):
            line = lines.setdefault(
                tuple(setting(trial, field) for field in fields), {count: [] for count in sorted(names)}
            )
            for count in line:
                line[count].append(trial.metrics[names[count]])
    ordered = sorted(lines, key=lambda key: [(isinstance(value, str), value) for value in key])
    return [(_line_name(fields, key, lines[key]), lines[key]) for key in ordered]


def _line_name(fields: Sequence[str], values: Sequence[Value], line: Line) -> str:
    told = [
        f"{field}={label(value)}" for field, value in zip(fields, values, strict=True) if value != MISSING
    ]
    return fill(", ".join([*told, f"n = {len(next(iter(line.values())))}"]), _LEGEND_WIDTH)


def _draw_named(figure: Figure, axes: Axes, lines: Sequence[tuple[str, Line]]) -> None:
    """The means, with a band from the lowest to the highest loss."""
    for index, (name, line) in enumerate(lines):
        colour = colormaps["turbo"](0.08 + 0.84 * index / max(1, len(lines) - 1))
        means, lows, highs = ([pick(losses) for losses in line.values()] for pick in (fmean, min, max))
        axes.plot(list(line), means, color=colour, marker="osD^v<>pPX*h"[index], ms=5, label=name)
        axes.fill_between(list(line), lows, highs, color=colour, alpha=0.12, linewidth=0)
    columns = max(1, min(4, _LEGEND_WIDTH // max(len(name) for name, _ in lines)))
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _draw_by_tax(figure: Figure, axes: Axes, lines: Sequence[Line]) -> None:
    """The means, coloured by how much each rises from its fewest to its most branches."""
    means = [[fmean(losses) for losses in line.values()] for line in lines]
    taxes = [mean[-1] - mean[0] for mean in means]
    norm = Normalize(min(taxes), max(taxes))
    for tax, mean in sorted(zip(taxes, means, strict=True), reverse=True):
        axes.plot(list(lines[0]), mean, color=_COLOURS(norm(tax)), marker="o", ms=3, linewidth=1)
    figure.colorbar(
        ScalarMappable(norm, _COLOURS),
        ax=axes,
        label="branch tax: loss at the most minus at the fewest branches",
    )


def heat_map(trials: Sequence[Trial], objective: str) -> Figure | None:
    """The objective over two swept fields: `rope_2d_ratio` and `lora_rank` where both were, else the most
    varied ones.
    """
    rows = {field: in_order(setting(trial, field) for trial in trials) for field in varied(trials)}
    fields = sorted(
        (field for field in rows if len(rows[field]) <= _MOST_ROWS), key=lambda field: -len(rows[field])
    )
    if {"rope_2d_ratio", "lora_rank"} <= set(fields):
        fields = ["rope_2d_ratio", "lora_rank"]
    if len(fields) < 2 or not (cells := _cells(trials, fields[:2], objective)):
        return None
    across, up = fields[:2]
    figure = Figure(figsize=(2.6 + 0.85 * len(rows[across]), 1.9 + 0.5 * len(rows[up])), layout="constrained")
    axes = figure.add_subplot(xlabel=across, ylabel=up)
    norm = (LogNorm if wants_log(cells.values()) else Normalize)(min(cells.values()), max(cells.values()))
    axes.patch.set(
        hatch="////", edgecolor="#cccccc", facecolor="white"
    )  # shows through where nothing was measured
    grid = [[cells.get((x, y), math.nan) for x in rows[across]] for y in rows[up]]
    image = axes.imshow(grid, cmap=_COLOURS, norm=norm, origin="lower", aspect="auto")
    for (x, y), value in cells.items():
        spot, colour = (rows[across].index(x), rows[up].index(y)), "white" if norm(value) < 0.6 else "black"
        axes.text(*spot, f"{value:#.4g}", ha="center", va="center", size=9, color=colour)
    axes.set_xticks(
        range(len(rows[across])), map(label, rows[across]), rotation=30 * isinstance(rows[across][-1], str)
    )
    axes.set_yticks(range(len(rows[up])), map(label, rows[up]))
    figure.colorbar(image, label=objective)
    return figure


def _cells(trials: Sequence[Trial], fields: Sequence[str], objective: str) -> dict[tuple[Value, ...], float]:
    """The mean objective of the finished trials by their values of the fields."""
    found: dict[tuple[Value, ...], list[float]] = {}
    for trial in _scored(trials, objective):
        found.setdefault(tuple(setting(trial, field) for field in fields), []).append(
            trial.metrics[objective]
        )
    return {key: fmean(values) for key, values in found.items()}


def _scored(trials: Sequence[Trial], objective: str) -> list[Trial]:
    """Trained to their end, so that their objectives may be compared."""
    return [
        trial for trial in trials if trial.status == "finished" and measured(trial, objective) is not None
    ]


def parallel_coordinates(trials: Sequence[Trial], objective: str) -> Figure | None:
    """One axis per varied field and the objective last; one line per trial, in the colour of its
    objective.
    """
    fields, scored = varied(trials), _scored(trials, objective)
    if not fields or not scored:
        return None
    unscored = [trial for trial in trials if trial.status in ("stopped", "failed")]
    shown = [*unscored, *sorted(scored, key=lambda trial: -trial.metrics[objective])]  # the best on top
    columns = [_places(setting(trial, field) for trial in shown) for field in fields]
    columns.append(_places(value for trial in shown if (value := measured(trial, objective)) is not None))
    figure = Figure(figsize=(max(7.0, 1.9 * len(columns)), 5), layout="constrained")
    axes = figure.add_subplot(xlim=(-0.5, len(columns) - 0.5), ylim=(-0.04, 1.06))
    for index, trial in enumerate(shown):
        values: list[Value | None] = [
            *(setting(trial, field) for field in fields),
            measured(trial, objective),
        ]
        heights = [column[value] for column, value in zip(columns, values, strict=True) if value is not None]
        if index < len(unscored):
            axes.plot(heights, color=_GREY, linewidth=0.7, linestyle="--")
        else:
            axes.plot(heights, color=_COLOURS(heights[-1]), linewidth=1.6, alpha=0.85)
    for x, (name, column) in enumerate(zip([*fields, objective], columns, strict=True)):
        _draw_axis(axes, x, name, column, labels_right=name == objective)
    axes.axis("off")
    return figure


def _places(values: Iterable[Value]) -> dict[Value, float]:
    """Where each value stands on its axis, 0..1: numbers to scale, in logarithms over a long span; categories
    in order.
    """
    ordered = in_order(values)
    places = [value for value in ordered if isinstance(value, float)]
    if len(places) < len(ordered):
        places = [float(index) for index in range(len(ordered))]
    elif wants_log(places):
        places = [math.log(place) for place in places]
    low, span = min(places), max(places) - min(places)
    return {
        value: (place - low) / span if span else 0.5 for value, place in zip(ordered, places, strict=True)
    }


def _draw_axis(axes: Axes, x: int, name: str, places: dict[Value, float], labels_right: bool) -> None:
    """A vertical line with its name above and, beside it, as many of the values as there is room for."""
    shift, side = (0.04, "left") if labels_right else (-0.04, "right")
    axes.plot([x, x], [0, 1], color="black", linewidth=1, zorder=3)
    axes.text(x, 1.04, name, ha="center", va="bottom", size=9, weight="bold")
    top = -1.0
    for value, place in places.items():
        if place - top >= _TICK_GAP and (place == 1 or 1 - place >= _TICK_GAP):
            top = place
            axes.text(x + shift, place, label(value), ha=side, va="center", size=8, bbox=_BOX, zorder=4)


def cost_vs_quality(trials: Sequence[Trial], objective: str) -> Figure | None:
    """What each trial reached against the seconds that it trained; the front joins those that none beats in
    both.
    """
    scored = [trial for trial in _scored(trials, objective) if trial.seconds > 0]
    if len(scored) < 2:
        return None
    stopped = [
        t for t in trials if t.status == "stopped" and t.seconds > 0 and measured(t, objective) is not None
    ]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds in training", ylabel=objective, xscale="log")
    for status, group, face, edge in (
        ("stopped early", stopped, "none", _GREY),
        ("finished", scored, _DOT, _DOT),
    ):
        x, y = [t.seconds for t in group], [t.metrics[objective] for t in group]
        axes.scatter(x, y, s=28, facecolors=face, edgecolors=edge, label=status if group else "", zorder=3)
        for t in group:
            axes.annotate(
                str(t.number), (t.seconds, t.metrics[objective]), (4, 4), textcoords="offset points", size=8
            )
    front = _front(scored, objective)
    x, y = [t.seconds for t in front], [t.metrics[objective] for t in front]
    axes.step(
        [*x, max(t.seconds for t in scored)], [*y, y[-1]], where="post", color=_FRONT, label="Pareto front"
    )
    axes.xaxis.set_major_formatter(LogFormatter())
    axes.xaxis.set_minor_formatter(LogFormatter())
    axes.set_yscale("log" if wants_log([t.metrics[objective] for t in (*scored, *stopped)]) else "linear")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return figure


def _front(trials: Sequence[Trial], objective: str) -> list[Trial]:
    """By seconds, those better than every cheaper one."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.seconds, trial.metrics[objective])):
        if not front or trial.metrics[objective] < front[-1].metrics[objective]:
            front.append(trial)
    return front
