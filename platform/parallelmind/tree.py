"""The tree of a sample: which segment continues which, and how segments relate to each other. NumPy only.

    segment := tokens [branches: segment+ [reduce: segment]]

The segments of a complete tree are numbered in pre-order: main is 0, the first branch 1, then the segments
below it, and so on. A reduce comes after everything below the branches that it reads. So the segments that a
reduce joins are those between its parent and itself.

Documents are the first branches of main: texts that are only read. A document reads itself alone, and has the
branch coordinate of main. So its keys and values depend on its text and its start time, and another start
time rotates the keys.

A tree that grows while it is decoded (`GrowingTree`) keeps its numbers, because computed tokens keep their
coordinates. A segment that is added gets the next free number, wherever it stands in the tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

MAIN = 0
NO_PARENT = -1

# Relations of a key's segment to a query's segment: another text of the row, or padding; the segment itself,
# or one that it continues at any distance; one that a reduce on this path has joined; any other segment.
UNRELATED, PATH, JOINED, SIBLING = range(4)


@dataclass(frozen=True)
class Tree:
    """The shape of a sample.

    parents: `[segments]` the segment that each segment continues, -1 for main. is_reduce: `[segments]`
    whether a segment is a reduce; it is the last one that continues its parent. documents: number of
    documents, which are the segments from 1 on; nothing continues them.
    """

    parents: Ints
    is_reduce: Mask
    documents: int = 0

    @staticmethod
    @lru_cache(maxsize=256)
    def flat(branches: int, has_reduce: bool = False) -> Tree:
        """Main and its branches, and possibly a reduce of main. The arrays are read-only."""
        parents = np.zeros(1 + branches + has_reduce, dtype=np.int64)
        parents[MAIN] = NO_PARENT
        is_reduce = np.zeros(len(parents), dtype=bool)
        is_reduce[1 + branches :] = True
        parents.flags.writeable = is_reduce.flags.writeable = False
        return Tree(parents, is_reduce)

    @property
    def segments(self) -> int:
        """Number of segments, main included."""
        return len(self.parents)

    @property
    def is_branch(self) -> Mask:
        """`[segments]` whether a segment is a branch: neither main nor a reduce."""
        is_branch = ~self.is_reduce
        is_branch[MAIN] = False
        return is_branch

    @property
    def branches(self) -> int:
        """Number of branches, at all depths."""
        return len(self.parents) - 1 - self.reduces

    @property
    def limited_branches(self) -> int:
        """Number of branches that a limit on those of a sample counts: all but documents."""
        return self.branches - self.documents

    @property
    def reduces(self) -> int:
        """Number of reduces, at all depths."""
        return int(np.count_nonzero(self.is_reduce))

    @property
    def depth(self) -> int:
        """Levels of nesting: 0 for main alone, 1 for a flat sample."""
        depths = [0]
        for _, parent, _ in self.walk():
            depths.append(depths[parent] + 1)
        return max(depths)

    @cached_property
    def is_flat(self) -> bool:
        """Whether the sample is main and branches alone."""
        return not (self.documents or self.parents[1:].any() or self.is_reduce.any())

    def walk(self) -> Iterator[tuple[int, int, range]]:
        """Every segment after main in pre-order: its number, its parent, and the segments that it joins."""
        numbered = zip(self.parents.tolist(), self.is_reduce.tolist(), strict=True)
        for number, (parent, is_reduce) in enumerate(numbered):
            if number != MAIN:
                yield number, parent, range(parent + 1, number if is_reduce else parent + 1)

    def take(self, kept: Ints) -> Self:
        """The tree of the kept segments. kept: their numbers, ascending, with all that each of them reads."""
        parents = np.searchsorted(kept, self.parents[kept])
        parents[:1] = NO_PARENT
        documents = np.count_nonzero((kept > MAIN) & (kept <= self.documents))
        return type(self)(parents, self.is_reduce[kept], int(documents))


@dataclass(frozen=True)
class GrowingTree(Tree):
    """A tree whose segments are numbered in the order in which they were added, a parent before its children.

    A reduce may have a lower number than a branch that it joins. `relations` and `branch_coordinates` take a
    growing tree. Everything else takes a complete one.
    """

    @cached_property
    def pre_order(self) -> Ints:
        """`[segments]` the numbers of the segments in the pre-order of the complete tree."""
        below: list[list[int]] = [[] for _ in range(self.segments)]
        for segment in np.lexsort((np.arange(self.segments), self.is_reduce))[::-1].tolist():
            if segment != MAIN:
                below[self.parents[segment]].append(segment)
        order, stack = [], [MAIN]
        while stack:
            order.append(stack.pop())
            stack += below[order[-1]]
        return np.array(order)

    def complete(self) -> Tree:
        """The same tree with its segments numbered in pre-order."""
        parents = np.argsort(self.pre_order)[self.parents[self.pre_order]]
        parents[MAIN] = NO_PARENT
        return Tree(parents, self.is_reduce[self.pre_order], self.documents)


def segment_names(tree: Tree) -> list[str]:
    """The place of every segment: main, document 1, branch 1, branch 1.2, branch 1.reduce and so on."""
    paths, siblings = [list[str]()], [0] * tree.segments
    siblings[MAIN] = -tree.documents
    for segment, parent, _ in tree.walk():
        siblings[parent] += 1
        paths.append([*paths[parent], "reduce" if tree.is_reduce[segment] else str(siblings[parent])])
    places = (".".join(path) for path in paths[1:])
    named = [place if place.startswith("reduce") else f"branch {place}" for place in places]
    return [
        "main",
        *(f"document {number}" for number in range(1, tree.documents + 1)),
        *named[tree.documents :],
    ]


def segment_paths(tree: Tree) -> list[str]:
    """The path of every segment in a request or a record: "", documents[0], branches[0].reduce, …

    Branches are counted from 0 in the order of their numbers.
    """
    paths, branches = [""], [0] * tree.segments
    for segment, parent, _ in tree.walk():
        if segment <= tree.documents:
            paths.append(f"documents[{segment - 1}]")
            continue
        step = "reduce" if tree.is_reduce[segment] else f"branches[{branches[parent]}]"
        branches[parent] += not tree.is_reduce[segment]
        paths.append(f"{paths[parent]}.{step}" if paths[parent] else step)
    return paths


def relations(tree: Tree) -> NDArray[np.int8]:
    """`[segments, segments]` relation of the key's segment (column) to the query's segment (row)."""
    if tree.is_flat:
        return _flat_relations(tree.segments)
    if isinstance(tree, GrowingTree):
        place = np.argsort(tree.pre_order)
        return relations(tree.complete())[np.ix_(place, place)]
    table = _flat_relations(tree.segments).copy()
    for segment, parent, joined in tree.walk():
        row = table[segment]
        row[:segment] = table[parent, :segment]  # no later segment is read
        if joined:
            row[joined.start : joined.stop] = JOINED
    table[1 : 1 + tree.documents, MAIN] = SIBLING
    return table


@lru_cache(maxsize=16)
def _flat_relations(segments: int) -> NDArray[np.int8]:
    """The relations of main and branches; read-only."""
    table = np.full((segments, segments), SIBLING, dtype=np.int8)
    table[:, MAIN] = PATH
    np.fill_diagonal(table, PATH)
    table.flags.writeable = False
    return table


def branch_coordinates(tree: Tree, has_main: bool, stride: int) -> Ints:
    """`[segments]` branch coordinates: number × stride, and that of its parent for a reduce.

    Main and documents are at 0; without a main the first branch is at 0, too. Documents are not numbered.
    """
    numbers = np.arange(tree.segments) - (not has_main) - tree.documents
    numbers[: 1 + tree.documents] = 0
    for reduce in np.flatnonzero(tree.is_reduce):
        numbers[reduce] = numbers[tree.parents[reduce]]
    return numbers * stride


def context_lengths(lengths: Sequence[int], tree: Tree) -> list[int]:
    """`[segments]` numbers of tokens that the last token of each segment reads, itself included.

    lengths: `[segments]` numbers of tokens.
    """
    before = [0, *np.cumsum(lengths).tolist()]
    context = [lengths[MAIN]]
    for segment, parent, joined in tree.walk():
        inherited = 0 if segment <= tree.documents else context[parent]
        context.append(inherited + before[joined.stop] - before[joined.start] + lengths[segment])
    return context


def with_context(chosen: Mask, tree: Tree) -> Mask:
    """`[segments]` the chosen segments and all that they read."""
    chosen = chosen.copy()
    for segment, parent, joined in reversed(list(tree.walk())):
        if chosen[segment]:
            chosen[parent] = chosen[joined.start : joined.stop] = True
    return chosen


def with_readers(chosen: Mask, tree: Tree) -> Mask:
    """`[segments]` the chosen segments and all that read one of them."""
    chosen = chosen.copy()
    for segment, parent, joined in tree.walk():
        chosen[segment] |= chosen[parent] or chosen[joined.start : joined.stop].any()
    return chosen


def divide(lengths: Sequence[int], tree: Tree, max_branches: int, max_tokens: int) -> Iterator[Ints]:
    """Divide the segments into samples of at most `max_branches` limited branches and `max_tokens` tokens.

    Yields the numbers of the segments of each, ascending. Every segment is in the same sample as all that it
    reads, so a sample that cannot be divided further may be larger.
    """
    is_limited = tree.is_branch
    is_limited[1 : 1 + tree.documents] = False
    parents, joined = tree.parents.tolist(), [range(0)]
    is_read = np.zeros(tree.segments, dtype=bool)
    for _, parent, joins in tree.walk():
        joined.append(joins)
        is_read[parent] = is_read[joins.start : joins.stop] = True

    def context(leaf: int, sample: set[int]) -> tuple[set[int], int, int]:
        """The segments that a leaf adds to a sample, their branches and their tokens."""
        new, segment = set[int](), leaf
        while segment != NO_PARENT and segment not in sample:
            new.update((segment, *joined[segment]))
            segment = parents[segment]
        new -= sample
        return new, sum(is_limited[segment] for segment in new), sum(lengths[segment] for segment in new)

    sample, branches, tokens = set[int](), 0, 0
    for leaf in np.flatnonzero(~is_read).tolist():
        new, new_branches, new_tokens = context(leaf, sample)
        if sample and (branches + new_branches > max_branches or tokens + new_tokens > max_tokens):
            yield np.array(sorted(sample))
            sample, branches, tokens = set(), 0, 0
            new, new_branches, new_tokens = context(leaf, sample)
        sample |= new
        branches, tokens = branches + new_branches, tokens + new_tokens
    yield np.array(sorted(sample))
