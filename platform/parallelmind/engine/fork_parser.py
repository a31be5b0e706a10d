"""Finds the forks that a model writes in the text of a branch. No torch.

A fork is a list of titles between markers (`ForkMarkers`). Everything else is text: a list without a title,
with an empty one or too many, with a marker where none belongs, and one that is not closed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from parallelmind.fork_markers import ForkMarkers


class Fork(NamedTuple):
    """A fork that a branch wrote itself.

    titles: the prompts of its branches, in order. branches: the indices of these. reduce: the index of the
    reduce that reads them all.
    """

    titles: tuple[str, ...]
    branches: tuple[int, ...]
    reduce: int


@dataclass(frozen=True, slots=True)
class ForkSyntax:
    """How a model writes a fork.

    special: the markers that are special tokens, which text does not show otherwise, by their ids.
    join_ids: the prompt of a reduce.
    """

    markers: ForkMarkers
    special: dict[int, str]
    join_ids: tuple[int, ...]


class ForkParser:
    """Parses the text of one branch while it is decoded, and withholds text that may become a fork.

    titles: of the fork that the last text completed; empty without one. `accept` or `refuse` it then.
    """

    __slots__ = ("_markers", "_max_titles", "_rest", "_withheld", "special", "titles")

    def __init__(self, syntax: ForkSyntax, max_titles: int) -> None:
        self.special = syntax.special
        self._markers, self._max_titles = syntax.markers, max_titles
        self._withheld = self._rest = ""
        self.titles: tuple[str, ...] = ()

    def push(self, text: str) -> str:
        """The text that can be shown now: it is part of no fork."""
        begin, _, end, _ = self._markers
        self._withheld += text
        shown = ""
        while (start := self._withheld.find(begin)) >= 0:
            shown += self._show(start)
            stop = self._withheld.find(end, len(begin))
            if stop < 0 and self._may_close():
                return shown
            if stop >= 0 and self._close(stop + len(end)):
                return shown
            shown += self._show(len(begin))
        return shown + self._show(len(self._withheld) - overlap(self._withheld, begin))

    def accept(self) -> str:
        """Take the list of titles off the text; returns what the last token added after it."""
        rest, self._withheld, self._rest, self.titles = self._rest, "", "", ()
        return rest

    def refuse(self) -> str:
        """The withheld text, which is text then; also at the end of the branch."""
        text, self._withheld, self._rest, self.titles = self._withheld, "", "", ()
        return text

    def _show(self, length: int) -> str:
        text, self._withheld = self._withheld[:length], self._withheld[length:]
        return text

    def _may_close(self) -> bool:
        """Whether the list that the withheld text begins with can still become a fork."""
        begin, separator, _, join = self._markers
        titles = self._withheld[len(begin) :]
        misplaced = begin in titles or join in titles
        return not misplaced and titles.count(separator) < self._max_titles

    def _close(self, length: int) -> bool:
        """Whether the first `length` characters of the withheld text are a fork."""
        titles = self._markers.read(self._withheld[:length])
        if not 0 < len(titles) <= self._max_titles:
            return False
        self.titles, self._rest = titles, self._withheld[length:]
        return True


def overlap(text: str, marker: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `marker`, `marker` itself excluded."""
    longest = min(len(text), len(marker) - 1)
    return next((length for length in range(longest, 0, -1) if marker.startswith(text[-length:])), 0)
