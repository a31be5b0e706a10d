"""The histograms of an inspection as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from parallelmind.errors import translate_write_errors
from workloads.data.histogram import histogram
from workloads.data.statistics import LengthStatistics, percentiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_BATCH_BARS = 40


def write_png(statistics: LengthStatistics, title: str, path: Path) -> None:
    """Write panels: tokens per branch and per reduce, branches per sample, tokens and padding per batch.

    Raises UserError if the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = [
        (statistics.branch_tokens, "tokens per branch", "branches"),
        (statistics.reduce_tokens, "tokens per reduce", "reduces"),
        (statistics.sample_branches, "branches per sample", "samples"),
    ]
    histograms = [item for item in series if item[0]]
    panels = len(histograms) + 1
    figure = Figure(figsize=(5 * panels, 5), layout="constrained")
    figure.suptitle(title, parse_math=False)
    *axes, last = figure.subplots(1, panels)
    for panel, item in zip(axes, histograms, strict=True):
        _draw_histogram(panel, *item)
    _draw_batches(last, statistics)
    with translate_write_errors("png_path", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(path)


def _draw_histogram(axes: Axes, values: Sequence[int], title: str, unit: str) -> None:
    buckets = histogram(values)
    median, *_, maximum = percentiles(values)
    axes.bar([bucket.label for bucket in buckets], [bucket.count for bucket in buckets], width=0.9)
    axes.set(
        title=f"{title.capitalize()} (median {median:,}, max {maximum:,})",
        xlabel=title,
        ylabel=f"number of {unit}",
    )
    axes.tick_params(axis="x", rotation=30 if len(buckets[-1].label) > 2 else 0)


def _draw_batches(axes: Axes, statistics: LengthStatistics) -> None:
    """Draw the batches from smallest to largest, averaged over at most 40 bars."""
    order = np.argsort(statistics.batch_padded_tokens, kind="stable")
    bar_batches = np.array_split(order, min(_MAX_BATCH_BARS, len(order)))
    counts = np.array([statistics.batch_tokens, statistics.batch_padded_tokens])
    tokens, padded_tokens = np.array([counts[:, batches].mean(axis=1) for batches in bar_batches]).T
    ends = 100 * np.cumsum([len(batches) for batches in bar_batches]) / len(order)
    widths = np.diff(ends, prepend=0)
    axes.bar(ends, tokens, -widths, align="edge", label="tokens")
    axes.bar(
        ends, padded_tokens - tokens, -widths, bottom=tokens, align="edge", label="padding", color="lightgrey"
    )
    axes.set_title(f"Padding is {statistics.padding:.1%} of all tokens ({len(order):,} batches)")
    axes.set(xlabel="batches from smallest to largest, in percent", ylabel="tokens per batch, with padding")
    axes.set_ylim(0, 1.05 * padded_tokens.max())
    axes.legend(loc="lower right")  # inside the bars, where it hides no edge of theirs
