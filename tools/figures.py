"""docs/figures: pictures of layouts, masks, rotary pairs and measured losses, drawn by the library's own
functions.

python -m tools.figures
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from parallelmind.config import BranchAngle, ModelConfig, Pairs, RopeConfig
from parallelmind.data.encode import encode_text
from parallelmind.layout import IGNORE, MAIN, Layout, Tokens, arrange
from parallelmind.model.base_model import load_tokenizer
from parallelmind.model.rope2d import pair_axes
from parallelmind.storage import write_atomic
from parallelmind.visibility import RULES, is_sibling

ROOT = Path(__file__).resolve().parents[1]
FOLDER, LOG = ROOT / "docs" / "figures", ROOT / "experiments" / "LOG.md"

PASSAGE = "For lunch Ada likes rice."
QUESTIONS = {" What does Ada eat?": " rice", " Who likes rice?": " Ada", " When?": " at noon"}

_INK, _PALE = "#26303c", "#e9ecf0"
_MAIN, _BRANCHES = "#c9d6e8", ("#f6d9a8", "#c5e0b9", "#e8c4d8")
_TARGET: dict[str, Any] = {"edgecolor": "#b3372f", "linewidth": 1.6}
_KINDS = {
    "flat": "#dde2e9",
    "branch": "#e07b39",
    "time": "#4c8dae",
}  # in the order of parallelmind.model.rope2d
_SEEN = ListedColormap(["white", "#3f6f94", "#e0a458"])
_CHOICES: tuple[tuple[str, float, Pairs, BranchAngle], ...] = (
    ("high, added, ratio 0.5 (default)", 0.5, "high", "added"),
    ("mid, added, ratio 0.5", 0.5, "mid", "added"),
    ("spread, added, ratio 0.25", 0.25, "spread", "added"),
    ("low, alone, ratio 0.25", 0.25, "low", "alone"),
    ("low, alone, ratio 0.5 (published)", 0.5, "low", "alone"),
    ("low, alone, ratio 1 (published)", 1.0, "low", "alone"),
    ("ratio 0", 0.0, "high", "added"),
)
_PAIRS = 32  # of a head of 64
_SCHEMES = {
    "published, ratio 0.5": "published, ratio 0.5",
    "published, ratio 1": "published, ratio 1",
    "high pairs by branch + time, no penalty": "ours without the penalty",
    "high pairs by branch + time, penalty 3": "ours",
}


def sample(encode: Callable[[str, bool], list[int]]) -> Tokens:
    """The passage with its questions and answers. encode: a text, and whether it opens the sample."""
    asked = [encode(question, False) for question in QUESTIONS]
    answered = [encode(answer, False) for answer in QUESTIONS.values()]
    branches = [question + answer for question, answer in zip(asked, answered, strict=True)]
    return Tokens.of(encode(PASSAGE, True), branches, [len(question) for question in asked])


def layout(tokens: Tokens, words: Callable[[int], str]) -> Figure:
    """Both alignments, time across and branches down. words: a token id as it should be read."""
    placed = [arrange(tokens, RopeConfig(align_to="left")), arrange(tokens, RopeConfig(align_to="right"))]
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    for axes, found, name in zip(figure.subplots(2, 1, sharex=True), placed, ("left", "right"), strict=True):
        axes.set_title(f"align_to={name}", loc="left", fontsize=10)
        _draw_tokens(axes, found, words)
    axes.set_xlabel("time coordinate")
    framed = [Rectangle((0, 0), 1, 1, facecolor="white", **_TARGET)]
    figure.legend(
        framed, ["predicts a token that carries loss"], loc="outside lower right", frameon=False, fontsize=9
    )
    return figure


def _draw_tokens(axes: Axes, found: Layout, words: Callable[[int], str]) -> None:
    for token, sequence, time, label in zip(found.ids, found.sequence, found.time, found.labels, strict=True):
        colour = _MAIN if sequence == MAIN else _BRANCHES[(sequence - 1) % len(_BRANCHES)]
        edge = _TARGET if label != IGNORE else {"edgecolor": "white"}
        axes.add_patch(Rectangle((time - 0.46, sequence - 0.4), 0.92, 0.8, facecolor=colour, **edge))
        axes.text(
            time,
            sequence,
            words(int(token)),
            ha="center",
            va="center",
            fontsize=9,
            color=_INK,
            parse_math=False,
        )
    coordinates = dict(zip(found.sequence.tolist(), found.branch.tolist(), strict=True))
    names = {number: "main" if number == MAIN else f"branch {number - 1}" for number in sorted(coordinates)}
    axes.set_yticks(
        list(names),
        [f"{name}\ncoordinate {coordinates[number]}" for number, name in names.items()],
        fontsize=8,
    )
    axes.set_xticks(range(int(found.time.max()) + 1))
    axes.set(xlim=(-0.6, found.time.max() + 0.6), ylim=(max(coordinates) + 0.6, -0.6))
    _bare(axes)


def masks(tokens: Tokens) -> Figure:
    """Who sees whom, queries down and keys across, in each policy's physical order."""
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    for axes, visibility in zip(figure.subplots(1, 2), RULES, strict=True):
        found = arrange(tokens, RopeConfig(visibility=visibility))
        query, key = found.sequence[:, None], found.sequence[None, :]
        seen = RULES[visibility](found.time[:, None], query, found.time[None, :], key) | np.eye(
            len(found.ids), dtype=bool
        )
        axes.imshow(np.where(seen & is_sibling(query, key), 2, seen), cmap=_SEEN, vmin=0, vmax=2)
        order = "by time, then branch" if visibility == "columnar" else "one branch after another"
        axes.set_title(f"visibility={visibility}\nstored {order}", loc="left", fontsize=10)
        _draw_owners(axes, found)
    figure.legend(
        handles=[Rectangle((0, 0), 1, 1, color=_SEEN(value)) for value in (1, 2)],
        labels=["main, its own branch and itself", "another branch: seen, less sibling_penalty"],
        loc="outside lower center", ncols=2, frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def _draw_owners(axes: Axes, found: Layout) -> None:
    """Along both edges: m for main, else the number of the branch."""
    names = ["m" if number == MAIN else str(number - 1) for number in found.sequence]
    places = np.arange(len(names))
    axes.set_xticks(places, names, fontsize=7)
    axes.set_yticks(places, names, fontsize=7)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    for place in places[:-1] + 0.5:
        axes.axhline(place, color=_PALE, linewidth=0.4)
        axes.axvline(place, color=_PALE, linewidth=0.4)
    axes.tick_params(length=0)


def pairs() -> Figure:
    """Which pair of a head follows which coordinate, by the settings that choose."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel=f"rotary pairs of a head of {2 * _PAIRS}, highest frequency first")
    for row, (_, ratio, where, angle) in enumerate(_CHOICES):
        for pair, kind in enumerate(pair_axes(_PAIRS, ratio, where, angle)):
            axes.add_patch(
                Rectangle((pair - 0.46, row - 0.38), 0.92, 0.76, facecolor=list(_KINDS.values())[kind])
            )
    axes.set_yticks(range(len(_CHOICES)), [name for name, *_ in _CHOICES], fontsize=9)
    axes.set_xticks([0, *range(7, _PAIRS, 8)], ["1", *map(str, range(8, _PAIRS + 1, 8))])
    axes.set(xlim=(-0.7, _PAIRS - 0.3), ylim=(len(_CHOICES) - 0.5, -0.5))
    _bare(axes)
    told = ("positions (time, or the flat index)", "branch (added: branch + time)", "time")
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in _KINDS.values()]
    figure.legend(
        handles=handles, labels=told, loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    return figure


def tax(losses: Mapping[str, Mapping[int, float]]) -> Figure:
    """What siblings cost, by scheme. losses: of each, by number of branches."""
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel="branches in the sample", ylabel="branch tax (nats per target token)")
    colours = dict(zip(_SCHEMES, ("#b3372f", "#d98c3f", "#7f8c99", "#2f7d4f"), strict=True))
    for name, line in losses.items():
        taxes = [loss - line[1] for loss in line.values()]
        axes.plot(list(line), taxes, marker="o", ms=4, color=colours[name], label=_SCHEMES[name])
        axes.annotate(
            f"{taxes[-1]:+.2f}",
            (max(line), taxes[-1]),
            (7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    counts = list(next(iter(losses.values())))
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlim(counts[0] * 0.93, counts[-1] * 1.25)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def logged(log: str) -> dict[str, dict[int, float]]:
    """The losses of the schemes by number of branches, from the table of the log that lists them."""
    head = re.search(r"^\| scheme \|(.+)\|$", log, re.MULTILINE)
    assert head, "the log has no table of schemes"
    counts = [int(cell.split()[0]) for cell in head[1].split("|")]
    rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in log[head.end() :].splitlines()[2:12]
    ]
    cells = {re.sub(r"\*\*.*$", "", row[0]): row[1:] for row in rows if len(row) == len(counts) + 1}
    return {name: dict(zip(counts, map(float, cells[name]), strict=True)) for name in _SCHEMES}


def _bare(axes: Axes) -> None:
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw(folder: Path, tokenizer: Any) -> Sequence[Path]:
    """Every figure as a PNG in `folder`."""
    tokens = sample(lambda text, first: encode_text(tokenizer, text, first))
    figures = {
        "layout": layout(tokens, lambda token: tokenizer.decode([token])),
        "masks": masks(tokens),
        "pairs": pairs(),
        "tax": tax(logged(LOG.read_text(encoding="utf-8"))),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        with write_atomic(folder / f"{name}.png") as file:
            figure.savefig(
                file, format="png", dpi=110, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None}
            )
    return [folder / f"{name}.png" for name in figures]


if __name__ == "__main__":
    print(*draw(FOLDER, load_tokenizer(ModelConfig())), sep="\n")
