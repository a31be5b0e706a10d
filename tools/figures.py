"""Draw docs/figures: layouts, masks, a tree, rotary pairs and losses, with the library's own functions.

Usage: python -m tools.figures
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from numpy.typing import NDArray

from parallelmind.config import BranchAngle, ModelConfig, Pairs, RopeConfig, Visibility
from parallelmind.data.encode import encode_text
from parallelmind.layout import IGNORE, Layout, Tokens, arrange
from parallelmind.model.base_model import load_tokenizer
from parallelmind.model.rope2d import pair_axes
from parallelmind.storage import atomic_binary_file
from parallelmind.tree import MAIN, SIBLING, Tree, relations, segment_names
from parallelmind.visibility import relation_scores

ROOT = Path(__file__).resolve().parents[1]
FOLDER, LOG = ROOT / "docs" / "figures", ROOT / "experiments" / "LOG.md"

PASSAGE = "For lunch Ada likes rice."
QUESTIONS = {" What does Ada eat?": " rice", " Who likes rice?": " Ada", " When?": " at noon"}
# A trip, in pre-order: two offers below the first branch, which its reduce joins, and a reduce of main.
TREE = Tree(parents=np.array([-1, 0, 1, 1, 1, 0, 0]), is_reduce=np.isin(np.arange(7), [4, 6]))
TREE_TEXTS = (
    "Plan a trip.",
    " Stay there",
    " by sea",
    " in town",
    " So sea",
    " Train early",
    " In short good",
)

_INK, _PALE = "#26303c", "#e9ecf0"
_MAIN, _BRANCHES = "#c9d6e8", ("#f6d9a8", "#c5e0b9", "#e8c4d8")
_TARGET: dict[str, Any] = {"edgecolor": "#b3372f", "linewidth": 1.6}
# In the order of the axes of parallelmind.model.rope2d.
_AXIS_COLOURS = {"flat": "#dde2e9", "branch": "#e07b39", "time": "#4c8dae"}
_MASK_COLOURS = ListedColormap(["white", "#3f6f94", "#e0a458"])
_RELATION_COLOURS = ListedColormap(["white", "#3f6f94", "#5b9a68", "#e0a458"])  # the number is the relation
_PAIR_SETTINGS: tuple[tuple[str, float, Pairs, BranchAngle], ...] = (
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
    """Encode the passage with its questions and answers.

    `encode(text, first)` returns token ids; `first` is True for the text that opens the sample.
    """
    questions = [encode(question, False) for question in QUESTIONS]
    answers = [encode(answer, False) for answer in QUESTIONS.values()]
    branches = [question + answer for question, answer in zip(questions, answers, strict=True)]
    return Tokens.of(encode(PASSAGE, True), branches, [len(question) for question in questions])


def tree_sample(encode: Callable[[str, bool], list[int]]) -> Tokens:
    """Encode the trip. Main and the two offers are read only; of other texts the first token is no target."""
    segments = [encode(text, not number) for number, text in enumerate(TREE_TEXTS)]
    offsets = [len(ids) if number in (2, 3) else 1 for number, ids in enumerate(segments)]
    return Tokens.of_tree(segments, TREE, offsets[1:])


def layout(tokens: Tokens, words: Callable[[int], str]) -> Figure:
    """Draw both alignments, time on x and branches on y. `words(id)` returns the text of a token."""
    layouts = [arrange(tokens, RopeConfig(align_to="left")), arrange(tokens, RopeConfig(align_to="right"))]
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    for axes, arranged, name in zip(
        figure.subplots(2, 1, sharex=True), layouts, ("left", "right"), strict=True
    ):
        axes.set_title(f"align_to={name}", loc="left", fontsize=10)
        _draw_tokens(axes, arranged, words)
    axes.set_xlabel("time coordinate")
    handles = [Rectangle((0, 0), 1, 1, facecolor="white", **_TARGET)]
    figure.legend(
        handles, ["predicts a token that carries loss"], loc="outside lower right", frameon=False, fontsize=9
    )
    return figure


def _draw_tokens(axes: Axes, arranged: Layout, words: Callable[[int], str]) -> None:
    for token, segment, branch, time, label in zip(
        arranged.ids, arranged.segment, arranged.branch, arranged.time, arranged.labels, strict=True
    ):
        number = branch // RopeConfig().branch_stride  # a reduce has that of the segment that it continues
        colour = _MAIN if number == MAIN else _BRANCHES[(number - 1) % len(_BRANCHES)]
        edge = _TARGET if label != IGNORE else {"edgecolor": "white"}
        axes.add_patch(Rectangle((time - 0.46, segment - 0.4), 0.92, 0.8, facecolor=colour, **edge))
        axes.text(
            time,
            segment,
            words(int(token)),
            ha="center",
            va="center",
            fontsize=9,
            color=_INK,
            parse_math=False,
        )
    coordinates = dict(zip(arranged.segment.tolist(), arranged.branch.tolist(), strict=True))
    names = segment_names(arranged.tree)
    axes.set_yticks(
        list(coordinates),
        [f"{names[number]}\ncoordinate {coordinate}" for number, coordinate in coordinates.items()],
        fontsize=8,
    )
    axes.set_xticks(range(int(arranged.time.max()) + 1))
    axes.set(xlim=(-0.6, arranged.time.max() + 0.6), ylim=(max(coordinates) + 0.6, -0.6))
    _bare(axes)


def masks(tokens: Tokens) -> Figure:
    """Draw the mask of each policy in storage order, queries down and keys across."""
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    for axes, visibility in zip(figure.subplots(1, 2), get_args(Visibility), strict=True):
        arranged = arrange(tokens, RopeConfig(visibility=visibility))
        visible = _visible_relations(arranged, visibility)
        axes.imshow(np.where(visible == SIBLING, 2, visible), cmap=_MASK_COLOURS, vmin=0, vmax=2)
        order = "by time, then branch" if visibility == "columnar" else "one branch after another"
        axes.set_title(f"visibility={visibility}\nstored {order}", loc="left", fontsize=10)
        _draw_owners(axes, arranged)
    figure.legend(
        handles=[Rectangle((0, 0), 1, 1, color=_MASK_COLOURS(value)) for value in (1, 2)],
        labels=["main and own branch", "another branch: visible, scores minus sibling_penalty"],
        loc="outside lower center", ncols=2, frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def _visible_relations(arranged: Layout, visibility: Visibility) -> NDArray[np.int8]:
    """`[tokens, tokens]` relation of each visible key (column) to a query (row), 0 if not visible."""
    related = relations(arranged.tree)[arranged.segment[:, None], arranged.segment]
    earlier = arranged.time < arranged.time[:, None]
    visible = earlier & (relation_scores(visibility)[related] == 0) | np.eye(len(related), dtype=bool)
    return np.where(visible, related, 0).astype(np.int8)


def tree(tokens: Tokens, words: Callable[[int], str]) -> Figure:
    """Draw a tree in time and segment, with arrows for forks and joins, and its mask for each policy."""
    figure = Figure(figsize=(12, 10.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(4, 6))
    top = figure.add_subplot(grid[0, :], xlabel="time coordinate")
    arranged = arrange(tokens, RopeConfig())
    _draw_tokens(top, arranged, words)
    _draw_arrows(top, arranged)
    for column, visibility in enumerate(get_args(Visibility)):
        axes, arranged = (
            figure.add_subplot(grid[1, column]),
            arrange(tokens, RopeConfig(visibility=visibility)),
        )
        axes.imshow(_visible_relations(arranged, visibility), cmap=_RELATION_COLOURS, vmin=0, vmax=3)
        order = "by time, then segment" if visibility == "columnar" else "one segment after another"
        axes.set_title(f"visibility={visibility}\nstored {order}", loc="left", fontsize=10)
        _draw_owners(axes, arranged)
    labels = ["predicts a token that carries loss", "path", "joined", "sibling: scores minus sibling_penalty"]
    handles = [Rectangle((0, 0), 1, 1, color=_RELATION_COLOURS(relation)) for relation in (1, 2, 3)]
    handles.insert(0, Rectangle((0, 0), 1, 1, facecolor="white", **_TARGET))
    figure.legend(
        handles=handles, labels=labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    return figure


def _draw_arrows(axes: Axes, arranged: Layout) -> None:
    """An arrow from the end of every text to what begins after it: solid for a fork, dashed for a join."""
    times = [arranged.time[arranged.segment == number] for number in range(arranged.tree.segments)]
    ends = {MAIN}  # segments that nothing continues or joins so far
    for segment, parent, joined in arranged.tree.walk():
        for source in ends.intersection(joined) or [parent]:
            arrow = FancyArrowPatch(
                (times[source].max() + 0.46, source), (times[segment].min() - 0.3, segment - 0.42),
                connectionstyle="angle3,angleA=0,angleB=90", arrowstyle="-|>", mutation_scale=9,
                color=_INK, linewidth=0.9, linestyle="dashed" if joined else "solid", zorder=0,
            )  # fmt: skip
            axes.add_patch(arrow)
        ends = ends - {parent, *joined} | {segment}


def _draw_owners(axes: Axes, arranged: Layout) -> None:
    """Label both axes: m for main, r for its reduce, otherwise the place of the branch or of its reduce."""
    short = [
        name.replace("main", "m").removeprefix("branch ").replace("reduce", "r")
        for name in segment_names(arranged.tree)
    ]
    names = [short[number] for number in arranged.segment]
    ticks = np.arange(len(names))
    axes.set_xticks(ticks, names, fontsize=7)
    axes.set_yticks(ticks, names, fontsize=7)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    for edge in ticks[:-1] + 0.5:
        axes.axhline(edge, color=_PALE, linewidth=0.4)
        axes.axvline(edge, color=_PALE, linewidth=0.4)
    axes.tick_params(length=0)


def pairs() -> Figure:
    """Draw which coordinate drives each rotary pair of a head, for several settings."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel=f"rotary pairs of a head of {2 * _PAIRS}, highest frequency first")
    for row, (_, ratio, where, angle) in enumerate(_PAIR_SETTINGS):
        for pair, axis in enumerate(pair_axes(_PAIRS, ratio, where, angle)):
            axes.add_patch(
                Rectangle((pair - 0.46, row - 0.38), 0.92, 0.76, facecolor=list(_AXIS_COLOURS.values())[axis])
            )
    axes.set_yticks(range(len(_PAIR_SETTINGS)), [name for name, *_ in _PAIR_SETTINGS], fontsize=9)
    axes.set_xticks([0, *range(7, _PAIRS, 8)], ["1", *map(str, range(8, _PAIRS + 1, 8))])
    axes.set(xlim=(-0.7, _PAIRS - 0.3), ylim=(len(_PAIR_SETTINGS) - 0.5, -0.5))
    _bare(axes)
    labels = ("positions (time, or the flat index)", "branch (added: branch + time)", "time")
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in _AXIS_COLOURS.values()]
    figure.legend(
        handles=handles, labels=labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9
    )
    return figure


def tax(losses: Mapping[str, Mapping[int, float]]) -> Figure:
    """Draw branch tax by scheme. `losses`: for each scheme, the loss by number of branches."""
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


def losses_of_log(log: str) -> dict[str, dict[int, float]]:
    """Parse the table of schemes in LOG.md: loss by number of branches for each scheme."""
    header = re.search(r"^\| scheme \|(.+)\|$", log, re.MULTILINE)
    assert header, "the log has no table of schemes"
    counts = [int(cell.split()[0]) for cell in header[1].split("|")]
    rows = [
        [cell.strip(" *") for cell in line.strip("|").split("|")]
        for line in log[header.end() :].splitlines()[2:12]
    ]
    cells = {re.sub(r"\*\*.*$", "", row[0]): row[1:] for row in rows if len(row) == len(counts) + 1}
    return {name: dict(zip(counts, map(float, cells[name]), strict=True)) for name in _SCHEMES}


def _bare(axes: Axes) -> None:
    """Remove tick marks and frame."""
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def draw(folder: Path, tokenizer: Any) -> Sequence[Path]:
    """Write every figure as a PNG into `folder` and return the paths."""
    encode = partial(encode_text, tokenizer)
    tokens = sample(encode)
    figures = {
        "layout": layout(tokens, lambda token: tokenizer.decode([token])),
        "masks": masks(tokens),
        "tree": tree(tree_sample(encode), lambda token: tokenizer.decode([token])),
        "pairs": pairs(),
        "tax": tax(losses_of_log(LOG.read_text(encoding="utf-8"))),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        with atomic_binary_file(folder / f"{name}.png") as file:
            figure.savefig(
                file, format="png", dpi=110, bbox_inches="tight", pad_inches=0.15, metadata={"Software": None}
            )
    return [folder / f"{name}.png" for name in figures]


if __name__ == "__main__":
    print(*draw(FOLDER, load_tokenizer(ModelConfig())), sep="\n")
