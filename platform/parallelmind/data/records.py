"""Records of parallel JSONL: trees of segments, each with a text and its targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parallelmind.tree import MAIN, NO_PARENT, Tree

TextOrIds = str | list[int]
Spans = tuple[tuple[int, int | None], ...]  # half-open, sorted and disjoint; None is the end of the text

MAX_DEPTH = 64  # levels of nested `branches` and `reduce`; far from Python's limit of recursion


class RecordError(ValueError):
    """The reason why a line is not a record."""


class _Fork:
    """What may be followed by branches, and by a reduce that reads them all."""

    __slots__ = ()
    branches: tuple[Segment, ...]
    reduce: Segment | None

    def walk(self) -> Iterator[Segment]:
        """Every segment below this one, in pre-order."""
        for segment, _ in self._below():
            yield segment
            yield from segment.walk()

    def _below(self) -> list[tuple[Segment, bool]]:
        """The segments that continue this one, and whether each is a reduce."""
        below = [(branch, False) for branch in self.branches]
        return below if self.reduce is None else [*below, (self.reduce, True)]


@dataclass(frozen=True, slots=True)
class Segment(_Fork):
    """A branch or a reduce. With a completion, `body` is the prompt and the completion holds the targets.

    targets: tokens that are targets, for a segment without completion. rendered: the text is that of a chat
    template, which has written the special tokens. references: other correct completions; an evaluation
    accepts any of them, training uses the completion. branches: they begin where this segment ends. reduce:
    continues this segment when they have ended. writes_fork: the text ends with the fork into these branches,
    so that no end token follows.
    """

    body: TextOrIds
    completion: str | None = None
    targets: Spans = ((0, None),)
    rendered: bool = False
    references: tuple[str, ...] = ()
    branches: tuple[Segment, ...] = ()
    reduce: Segment | None = None
    writes_fork: bool = False


@dataclass(frozen=True, slots=True)
class Record(_Fork):
    """One line of parallel JSONL.

    standalone: the record is a single branch without main; packing groups such records into samples.
    unknown_keys: keys that have no meaning where they stand, such as `id`, `main.id`, `branches[].id` and
    `branches[].reduce.id`. reduce: continues main when all branches have ended. documents: how many of the
    branches, counted from the first one, are documents: texts without targets that nothing continues.
    """

    main: TextOrIds
    branches: tuple[Segment, ...]
    standalone: bool
    unknown_keys: tuple[str, ...] = ()
    reduce: Segment | None = None
    documents: int = 0

    @property
    def is_flat(self) -> bool:
        """Whether the record is main and branches alone."""
        return self.reduce is None and all(not branch.branches for branch in self.branches)

    @property
    def num_branches(self) -> int:
        """Number of branches, at all depths."""
        return self.tree.branches

    @property
    def num_reduces(self) -> int:
        """Number of reduces, at all depths."""
        return self.tree.reduces

    @property
    def tree(self) -> Tree:
        """The shape of the record."""
        if self.is_flat:
            return Tree.flat(len(self.branches))
        parents, is_reduce = [NO_PARENT], [False]

        def add_below(fork: _Fork, number: int) -> None:
            for segment, reduces in fork._below():
                parents.append(number)
                is_reduce.append(reduces)
                add_below(segment, len(parents) - 1)

        add_below(self, MAIN)
        return Tree(np.array(parents), np.array(is_reduce), self.documents)


def check_surrogates(text: str, where: str) -> None:
    """Raise RecordError if the text holds half of a surrogate pair, which no tokenizer accepts."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise RecordError(f"{where} holds half of a surrogate pair, which is not a character")
