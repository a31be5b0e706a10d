"""Figures of the evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from parallelmind.evaluation.attention_maps import AttentionMap
from parallelmind.evaluation.branch_tax import TaxPoint
from parallelmind.tree import segment_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

_MIN_SHARE = 1e-4  # lower end of the logarithmic colour scale
_DARK_BELOW = 0.03  # share of attention whose colour needs bright text
_MAX_TEXTS = 80  # tokens in a row that have room for their texts
_MIN_TAX_RANGE = 0.1  # nats; a smaller tax looks small


def tax_figure(points: Sequence[TaxPoint]) -> Figure:
    """Tax by branch count, on a logarithmic axis of branch counts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="branches per sample",
        ylabel="tax (nats per target token)",
        title=f"Branch tax; loss at one branch is {points[0].loss:.3f}",
    )
    counts = [point.branches for point in points]
    axes.axhline(0, color="grey", linewidth=1)
    taxes = [point.tax for point in points]
    axes.plot(counts, taxes, marker="o")
    missing = max(_MIN_TAX_RANGE - (max(0, *taxes) - min(0, *taxes)), 0) / 2
    axes.set_ylim(min(0, *taxes) - missing - 0.01, max(0, *taxes) + missing + 0.01)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, list(map(str, counts)))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    return figure


def attention_figure(attention: AttentionMap, texts: Sequence[Sequence[str]]) -> Figure:
    """Maps of the mean over all layers and of the first, the middle and the last layer.

    texts: those of the tokens of every segment, which are written into a map that has room for them.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, segments, times = attention.weights.shape
    panels = {f"mean of {layers} layers": attention.weights.mean(axis=0)}
    panels |= {
        f"layer {number}": attention.weights[number] for number in sorted({0, layers // 2, layers - 1})
    }
    shows_texts = times <= _MAX_TEXTS
    longest = max((len(text) for row in texts for text in row), default=1) if shows_texts else 4
    width, height = (0.2, 0.1 + 0.07 * longest) if shows_texts else (0.12, 0.3)
    size = (min(4 + times * width, 20), (1 + height * segments) * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True)
    for axes, (title, weights) in zip(all_axes, panels.items(), strict=True):
        image = _draw_map(axes, weights, attention)
        axes.set_title(title, fontsize=9)
        if shows_texts:
            _write_texts(axes, weights, texts)
    all_axes[-1].set_xlabel("time")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=all_axes, label="share of attention", extend="min")
    return figure


def _write_texts(axes: Axes, weights: NDArray[np.float32], texts: Sequence[Sequence[str]]) -> None:
    """Write the text of each token into its cell."""
    for segment, row in enumerate(texts):
        times = np.flatnonzero(~np.isnan(weights[segment])).tolist()
        for time, text in zip(times, row, strict=True):
            colour = "white" if weights[segment, time] < _DARK_BELOW else "black"
            axes.text(time, segment, text, rotation=90, ha="center", va="center", fontsize=7, color=colour)


def _draw_map(axes: Axes, weights: NDArray[np.float32], attention: AttentionMap) -> AxesImage:
    """Draw `[segments, times]` weights; cells without a token are grey, query tokens have a red frame."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    clipped = np.where(np.isnan(weights), np.nan, np.clip(weights, _MIN_SHARE, 1))
    axes.set_facecolor("lightgrey")
    image = axes.imshow(
        clipped, aspect="auto", norm=LogNorm(_MIN_SHARE, 1), cmap="viridis", interpolation="nearest"
    )
    first, last = attention.query_times[0], attention.query_times[-1]
    corner = (first - 0.5, attention.query_segment - 0.5)
    axes.add_patch(Rectangle(corner, last - first + 1, 1, fill=False, edgecolor="red", linewidth=1.5))
    labels = segment_names(attention.tree)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    return image
