"""Pictures of the evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from parallelmind.evaluation.attention_maps import AttentionMap
from parallelmind.evaluation.branch_tax import TaxPoint
from parallelmind.layout import MAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from numpy.typing import NDArray

_LEAST = 1e-4  # share of attention that is still told from none


def tax_figure(points: Sequence[TaxPoint]) -> Figure:
    """Tax by branch count; its axis shows doublings as equal steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="branches per sample",
        ylabel="tax (nats per target token)",
        title=f"Branch tax; loss of 1 is {points[0].loss:.3f}",
    )
    counts = [point.branches for point in points]
    axes.axhline(0, color="grey", linewidth=1)
    axes.plot(counts, [point.tax for point in points], marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, list(map(str, counts)))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    return figure


def attention_figure(found: AttentionMap) -> Figure:
    """One map for the mean over layers, and one each for the first, the middle and the last layer."""
    from matplotlib.figure import Figure

    layers = len(found.weights)
    panels = {f"mean of {layers} layers": found.weights.mean(axis=0)}
    panels |= {f"layer {number}": found.weights[number] for number in sorted({0, layers // 2, layers - 1})}
    rows, times = found.weights.shape[1:]
    figure = Figure(figsize=(min(4 + times * 0.12, 16), (1 + 0.3 * rows) * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for place, (title, mass) in zip(axes, panels.items(), strict=True):
        image = _draw_map(place, mass, found)
        place.set_title(title, fontsize=9)
    axes[-1].set_xlabel("time")
    figure.colorbar(image, ax=axes, label="share of attention", extend="min")
    return figure


def _draw_map(axes: Axes, mass: NDArray[np.float32], found: AttentionMap) -> AxesImage:
    """Rows are main and the branches, columns times; what holds no token stays grey. The tokens that ask are
    framed.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    seen = np.where(np.isnan(mass), np.nan, np.clip(mass, _LEAST, 1))
    axes.set_facecolor("lightgrey")
    image = axes.imshow(seen, aspect="auto", norm=LogNorm(_LEAST, 1), cmap="viridis", interpolation="nearest")
    first, last = found.query_times[0], found.query_times[-1]
    frame = Rectangle(
        (first - 0.5, found.query_sequence - 0.5),
        last - first + 1,
        1,
        fill=False,
        edgecolor="red",
        linewidth=1.5,
    )
    axes.add_patch(frame)
    names = {number: "main" if number == MAIN else f"branch {number - 1}" for number in range(len(mass))}
    axes.set_yticks(list(names), list(names.values()), fontsize=8)
    return image
