"""The figure of `005_scale`: throughput, and the part that limits it."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLOURS = {
    "compute": "#4c956c",
    "dispatch": "#f2e8cf",
    "batch server": "#d1495b",
    "readers": "#edae49",
    "storage": "#8d5a97",
}
_NAMES = {"infiniband": "InfiniBand", "ethernet": "Ethernet"}


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Draw throughput on the left and the limits of both fabrics on the right."""
    fig = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(0.42, 0.58))  # type: ignore[misc]  # the stubs declare one subfigure
    _speeds(left.add_subplot(), [item for item in rows if item["fabric"] == "infiniband"])
    for index, fabric in enumerate(("infiniband", "ethernet")):
        _limits(
            right.add_subplot(2, 1, index + 1), [item for item in rows if item["fabric"] == fabric], fabric
        )
    named = [name for name in COLOURS if any(item["limit"] == name for item in rows)]
    handles = [Patch(color=COLOURS[name], label=name) for name in named]
    right.legend(handles=handles, loc="outside lower center", ncols=len(named), frameon=False)
    return fig


def _axes(rows: list[dict[str, Any]]) -> tuple[list[str], list[int]]:
    """Return models and numbers of GPUs in order of appearance."""
    return list(dict.fromkeys(item["model"] for item in rows)), list(
        dict.fromkeys(item["gpus"] for item in rows)
    )


def _speeds(axes: Axes, rows: list[dict[str, Any]]) -> None:
    models, workers = _axes(rows)
    for index, name in enumerate(models):
        own = [item for item in rows if item["model"] == name]
        speeds, colour = [item["tokens_per_s"] for item in own], f"C{index}"
        axes.plot(workers, speeds, marker="o", markersize=4, color=colour, label=name)
        ideal = own[0]["tokens_per_s"] / own[0]["efficiency"]
        axes.plot(workers, [ideal * n for n in workers], linestyle=":", color=colour, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens/s")
    axes.set_title("Throughput (InfiniBand); dotted: compute only, linear scaling", fontsize=10)
    axes.set_xticks(workers, labels=list(map(str, workers)))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="model", frameon=False)


def _limits(axes: Axes, rows: list[dict[str, Any]], fabric: str) -> None:
    """Draw a cell per model and number of GPUs: the colour is the limit, the number the compute share."""
    models, workers = _axes(rows)
    by = {(item["model"], item["gpus"]): item for item in rows}
    axes.imshow([[to_rgb(COLOURS[by[name, n]["limit"]]) for n in workers] for name in models], aspect="auto")
    for y, name in enumerate(models):
        for x, n in enumerate(workers):
            axes.text(
                x, y, f"{by[name, n]['efficiency']:.0%}", ha="center", va="center", color="black", fontsize=9
            )
    axes.set_xticks(range(len(workers)), labels=list(map(str, workers)))
    axes.set_yticks(range(len(models)), labels=list(models))
    axes.set_title(f"Limiting part, and compute share of a step: {_NAMES[fabric]} between nodes", fontsize=10)
    axes.set_xlabel("GPUs" if fabric == "ethernet" else "")
    axes.tick_params(length=0)
