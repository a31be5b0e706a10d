"""The texts with which a model forks by itself: it writes the titles of the branches between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self


class ForkMarkers(NamedTuple):
    """The four markers of a fork.

    begin, separator, end: before, between and after the titles. A branch begins with its title.
    join: what the reduce of the fork begins with.
    """

    begin: str
    separator: str
    end: str
    join: str

    @classmethod
    def of(cls, texts: Sequence[str]) -> Self | None:
        """The markers of a config's `fork_markers`; None for an empty list."""
        return cls(*texts) if texts else None

    def write(self, titles: Sequence[str]) -> str:
        """The text of a fork with these titles."""
        return f"{self.begin}{self.separator.join(titles)}{self.end}"

    def read(self, text: str) -> tuple[str, ...]:
        """The titles in a text of this form; empty unless each has a visible character and no marker."""
        titles = tuple(text[len(self.begin) : -len(self.end)].split(self.separator))
        fits = all(title.strip() and not self.are_in(title) for title in titles)
        return titles if fits else ()

    def are_in(self, text: str) -> bool:
        """Whether a text holds a marker."""
        return any(marker in text for marker in self)
