"""What tokenised records look like: lengths and padding in numbers, a sample as columns of text. NumPy only,
no torch, no Ray.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from parallelmind.layout import IGNORE, MAIN, Layout, Tokens

if TYPE_CHECKING:
    from parallelmind.data.tokenise import TokenisedRecord

PERCENTILES = (50, 90, 99, 100)

_SINGLE_VALUES = 12  # so many different whole numbers still get a bucket each
_WIDEST_TOKEN = 8
_ELLIPSIS = "…"
_VISIBLE = str.maketrans({"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "▁"})

Texts = Callable[[list[int]], list[str]]
Pieces = list[tuple[str, bool]]  # one line of text, cut where targets begin and end; True for a target


@dataclass(slots=True)
class Statistics:
    """Grows as records, and the batches made of them, pass by.

    branch_tokens, main_tokens: one entry per branch that is left and per main that is not empty. targets:
    tokens with a loss. truncated: mains and branches that were cut. skipped: branches left out. batch_places:
    padding included.
    """

    main_tokens: list[int] = field(default_factory=list)
    branch_tokens: list[int] = field(default_factory=list)
    targets: int = 0
    truncated: int = 0
    skipped: int = 0
    sample_branches: list[int] = field(default_factory=list)
    batch_tokens: list[int] = field(default_factory=list)
    batch_places: list[int] = field(default_factory=list)

    def add_record(self, item: TokenisedRecord) -> None:
        self.truncated += item.truncated
        self.skipped += item.skipped
        if item.tokens is None:
            return
        main, *branches = item.tokens.lengths.tolist()
        self.main_tokens += [main] if main else []
        self.branch_tokens += branches
        first_targets = np.maximum(item.tokens.answer_offsets, 1)  # nothing precedes a branch's first token
        self.targets += int((item.tokens.lengths[1:] - first_targets).sum())

    def add_batch(self, samples: Sequence[Tokens]) -> None:
        """The samples of one batch, which are padded to the longest of them."""
        lengths = [len(sample.ids) for sample in samples]
        self.sample_branches += [sample.branches for sample in samples]
        self.batch_tokens.append(sum(lengths))
        self.batch_places.append(len(samples) * max(lengths))

    @property
    def tokens(self) -> int:
        """Of all records, every main counted once however many samples repeat it."""
        return sum(self.main_tokens) + sum(self.branch_tokens)

    @property
    def padding(self) -> float:
        """Share of all places that hold no token."""
        return 1 - sum(self.batch_tokens) / max(sum(self.batch_places), 1)


def percentiles(values: Sequence[int]) -> list[int]:
    """The value below or at which 50, 90, 99 and 100 percent lie; always one of `values`. There must be
    one.
    """
    return [int(value) for value in np.percentile(values, PERCENTILES, method="inverted_cdf")]


@dataclass(frozen=True, slots=True)
class Bucket:
    """How many values lie in low..high, both included."""

    low: int
    high: int
    count: int

    @property
    def label(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}–{self.high}"


def buckets(values: Sequence[int]) -> list[Bucket]:
    """A histogram of whole numbers above 0, from the lowest to the highest.

    Few different numbers get a bucket each; otherwise two buckets to every doubling (…9–12, 13–16, 17–24…).
    """
    low, high = min(values), max(values)
    if high - low < _SINGLE_VALUES:
        ends = np.arange(low, high + 1)
    else:
        ends = np.unique(np.append(np.outer(2 ** np.arange(high.bit_length()), [2, 3]), 1))
    which = np.searchsorted(ends, values)
    counts = np.bincount(which)
    starts = np.append(ends[0], ends[:-1] + 1)
    return [
        Bucket(int(starts[index]), int(ends[index]), int(counts[index]))
        for index in range(which.min(), which.max() + 1)
    ]


def bars(found: Sequence[Bucket], width: int) -> list[str]:
    """One line per bucket, the fullest `width` wide; a bucket with any value in it shows."""
    labels = max(len(bucket.label) for bucket in found)
    fullest = max(bucket.count for bucket in found)
    lengths = [max(round(width * bucket.count / fullest), int(bucket.count > 0)) for bucket in found]
    return [
        f"{bucket.label:>{labels}}  {'█' * length:<{width}}  {bucket.count:,}"
        for bucket, length in zip(found, lengths, strict=True)
    ]


def columns(layout: Layout, texts: Texts, width: int, marks: tuple[str, str] = ("«", "»")) -> list[Pieces]:
    """A sample as text: time runs across, one line for main and for every branch, each token at its time
    coordinate.

    texts: the text of each token of a sequence. width: cells of a line; where not all of the sample fits, the
    beginnings of main, of the branches and of the targets stay. marks: stand around every target.
    """
    cells = _cells(layout, texts, marks)
    names = {
        int(sequence): "main" if sequence == MAIN else f"branch {sequence}"
        for sequence in np.unique(layout.sequence)
    }
    indent = max(map(len, names.values())) + 2
    widths: dict[int, int] = {}
    for (_, time), (text, _) in sorted(cells.items(), key=lambda item: item[0][1]):
        widths[time] = max(widths.get(time, len(str(time))), text_width(text))
    chosen = _chosen(list(widths), _anchors(layout), widths, width - indent)
    header: Pieces = [("time".ljust(indent), False)]
    lines = {sequence: [(name.ljust(indent), False)] for sequence, name in names.items()}
    for shown, run in groupby(widths, chosen.__contains__):
        for times in [[time] for time in run] if shown else [list(run)]:
            wide = widths[times[0]] if shown else 1
            header += _padded(str(times[0]) if shown else _ELLIPSIS, False, wide)
            for sequence, line in lines.items():
                text, target = next(
                    (cells[sequence, time] for time in times if (sequence, time) in cells), ("", False)
                )
                line += (
                    _padded(text, target, wide) if shown else _padded(_ELLIPSIS if text else "", False, wide)
                )
    return [header, *lines.values()]


def _padded(text: str, target: bool, wide: int) -> Pieces:
    """A token, and the space up to the next column, which is no part of a target."""
    return [(text, target), (" " * (wide + 1 - text_width(text)), False)]


def _cells(layout: Layout, texts: Texts, marks: tuple[str, str]) -> dict[tuple[int, int], tuple[str, bool]]:
    """(sequence, time) to what stands there and whether it is a target: the token before it has it as its
    label.
    """
    cells = {}
    for sequence in np.unique(layout.sequence).tolist():
        own = layout.sequence == sequence
        targets = np.append(False, layout.labels[own][:-1] != IGNORE).tolist()
        for time, text, target in zip(
            layout.time[own].tolist(), texts(layout.ids[own].tolist()), targets, strict=True
        ):
            shown = visible(text)
            cells[sequence, time] = (f"{marks[0]}{shown}{marks[1]}" if target else shown, target)
    return cells


def _anchors(layout: Layout) -> list[int]:
    """Times worth seeing: the beginning, and the last steps before the branches and before the first
    target.
    """
    starts = [int(layout.time.min()), int(layout.time[layout.sequence != MAIN].min()) - 1]
    predicting = layout.time[layout.labels != IGNORE]
    return sorted({*starts, *([int(predicting.min())] if len(predicting) else [])})


def _chosen(times: Sequence[int], anchors: Sequence[int], widths: dict[int, int], room: int) -> set[int]:
    """The columns that fit, from every anchor onwards in turns."""
    if sum(wide + 1 for wide in widths.values()) <= room:
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
    """A token's text in at most 8 cells, its white space and control characters made visible."""
    shown = "".join(letter if letter.isprintable() else "▯" for letter in text.translate(_VISIBLE))
    if text_width(shown) <= _WIDEST_TOKEN:
        return shown
    while text_width(shown) >= _WIDEST_TOKEN:
        shown = shown[:-1]
    return shown + _ELLIPSIS


def text_width(text: str) -> int:
    """Cells that a terminal gives to a text: two for East Asian wide letters, none for combining marks."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.category(letter) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(letter) in "WF")
               for letter in text)  # fmt: skip
