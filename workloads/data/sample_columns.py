"""A sample as columns of text: time runs across, one line for every segment, in pre-order."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np

from parallelmind.layout import IGNORE, Layout
from parallelmind.tree import segment_names

_MAX_TOKEN_WIDTH, _MAX_NAME_WIDTH = 8, 24  # cells
_MIN_ANCHORS, _ANCHOR_WIDTH = 3, 16  # places where a shortened sample is shown, and cells for each
_ELLIPSIS = "…"
_VISIBLE = str.maketrans({"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "▁"})

TokenTexts = Callable[[list[int]], list[str]]  # the text of each token of a segment
LinePieces = list[tuple[str, bool]]  # one line of text, divided into targets (True) and the rest

_Cells = dict[tuple[int, int], tuple[str, bool]]  # (segment, time) -> (text, whether it is a target)


def sample_columns(
    layout: Layout, token_texts: TokenTexts, width: int, marks: tuple[str, str] = ("«", "»")
) -> list[LinePieces]:
    """The lines of a sample, with every token at its time coordinate.

    A segment begins in the column after the last one that it continues or joins. width: cells per line. If
    the sample does not fit, the beginnings of main, of the branches and of the targets remain, and the joins
    of a tree as far as they fit. marks: texts around every target.
    """
    cells = _cells(layout, token_texts, marks)
    all_names = segment_names(layout.tree)
    names = {segment: _end(all_names[segment]) for segment in np.unique(layout.segment).tolist()}
    indent = max(map(len, names.values())) + 2
    widths = _column_widths(cells)
    shown_times = _choose_times(list(widths), _anchors(layout, width - indent), widths, width - indent)
    header: LinePieces = [("time".ljust(indent), False)]
    lines = {segment: [(name.ljust(indent), False)] for segment, name in names.items()}
    for shown, run in groupby(widths, shown_times.__contains__):
        for times in [[time] for time in run] if shown else [list(run)]:
            column_width = widths[times[0]] if shown else 1
            header += _pad(str(times[0]) if shown else _ELLIPSIS, False, column_width)
            for segment, line in lines.items():
                text, target = next(
                    (cells[segment, time] for time in times if (segment, time) in cells), ("", False)
                )
                if shown:
                    line += _pad(text, target, column_width)
                else:
                    line += _pad(_ELLIPSIS if text else "", False, column_width)
    return [header, *lines.values()]


def _end(name: str) -> str:
    """The name of a segment; of that of a deep one, the end."""
    return name if len(name) <= _MAX_NAME_WIDTH else _ELLIPSIS + name[1 - _MAX_NAME_WIDTH :]


def _pad(text: str, target: bool, column_width: int) -> LinePieces:
    """A token, and the space up to the next column, which does not belong to a target."""
    return [(text, target), (" " * (column_width + 1 - text_width(text)), False)]


def _cells(layout: Layout, token_texts: TokenTexts, marks: tuple[str, str]) -> _Cells:
    """The text of every token, and whether it is a target, i.e. the label of the token before it."""
    cells = {}
    for segment in np.unique(layout.segment).tolist():
        own = layout.segment == segment
        targets = np.append(False, layout.labels[own][:-1] != IGNORE).tolist()
        times = layout.time[own].tolist()
        texts = map(visible, token_texts(layout.ids[own].tolist()))
        for time, text, target in zip(times, texts, targets, strict=True):
            cells[segment, time] = (f"{marks[0]}{text}{marks[1]}" if target else text, target)
    return cells


def _column_widths(cells: _Cells) -> dict[int, int]:
    """Cells of every time's column, in the order of time."""
    widths: dict[int, int] = {}
    for (_, time), (text, _) in sorted(cells.items(), key=lambda item: item[0][1]):
        widths[time] = max(widths.get(time, len(str(time))), text_width(text))
    return widths


def _anchors(layout: Layout, room: int) -> list[int]:
    """Times to show first: the beginning, the last ones before the first target and the forks, and the joins.

    If `room` cells are too few for all of them, the forks and joins of the first segments remain.
    """
    tree, starts = layout.tree, np.full(layout.tree.segments, np.iinfo(np.int64).max)
    np.minimum.at(starts, layout.segment, layout.time)
    forks_and_joins = dict[tuple[int, bool], int]()  # by parent, and whether its reduce begins there
    for segment, parent, _ in tree.walk():
        is_reduce = bool(tree.is_reduce[segment])
        time = int(starts[segment]) - (not is_reduce)
        forks_and_joins[parent, is_reduce] = min(time, forks_and_joins.get((parent, is_reduce), time))
    predicting = np.sort(layout.time[layout.labels != IGNORE])[:1].tolist()
    others = (forks_and_joins[place] for place in sorted(forks_and_joins))
    anchors = list(dict.fromkeys([int(layout.time.min()), *predicting, *others]))
    return sorted(anchors[: max(_MIN_ANCHORS, room // _ANCHOR_WIDTH)])


def _choose_times(
    times: Sequence[int], anchors: Sequence[int], widths: dict[int, int], room: int
) -> set[int]:
    """The times whose columns fit into `room` cells, taken in turns from every anchor onwards."""
    if sum(width + 1 for width in widths.values()) <= room:
        return set(times)
    room -= 2 * len(anchors)  # an ellipsis after each run
    firsts = np.searchsorted(times, anchors).tolist()
    chosen: set[int] = set()
    for step in range(len(times)):
        for time in (times[first + step] for first in firsts if first + step < len(times)):
            room -= 0 if time in chosen else widths[time] + 1
            if room < 0:
                return chosen
            chosen.add(time)
    return chosen


def visible(text: str) -> str:
    """A token's text in at most 8 cells, with visible white space and control characters."""
    shown = "".join(letter if letter.isprintable() else "▯" for letter in text.translate(_VISIBLE))
    if text_width(shown) <= _MAX_TOKEN_WIDTH:
        return shown
    while text_width(shown) >= _MAX_TOKEN_WIDTH:
        shown = shown[:-1]
    return shown + _ELLIPSIS


def text_width(text: str) -> int:
    """Terminal cells of a text: two for a wide East Asian character, none for a combining mark."""
    return len(text) if text.isascii() else sum(map(_character_width, text))


def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
