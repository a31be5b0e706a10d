"""From samples to coordinates, physical order, labels and batches. NumPy only, without loops over tokens.

A sample is a tree of segments (`parallelmind.tree`): an optional `main`, N branches, and what follows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from parallelmind.config import Alignment, RopeConfig
from parallelmind.errors import UserError
from parallelmind.tree import MAIN, UNRELATED, Ints, Mask, Tree, branch_coordinates, relations

IGNORE = -100
PADDING = -1


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised sample.

    ids: `[total]` token ids, segment after segment.
    lengths: `[segments]` numbers of tokens of main (may be 0) and of every other segment (at least 1).
    targets: `[total]` whether a token is a target. No token of main is one, and no first token of a segment.
    tree: the shape of the sample.
    """

    ids: Ints
    lengths: Ints
    targets: Mask
    tree: Tree

    @staticmethod
    def of(
        main: Sequence[int],
        branches: Sequence[Sequence[int]],
        answer_offsets: Sequence[int] | None = None,
        targets: Sequence[Sequence[bool] | Mask] | None = None,
    ) -> Tokens:
        """A flat sample from plain lists. Raises UserError for no branch and for an empty branch.

        answer_offsets: index of the first target of each branch. targets: in its place, whether each token of
        each branch is a target. By default, every token of a branch is a target. The first token of a branch
        never is, as no token precedes it.
        """
        if not branches:
            raise UserError("branches=[]: a sample needs at least one branch")
        return Tokens.of_tree([main, *branches], Tree.flat(len(branches)), answer_offsets, targets)

    @staticmethod
    def of_tree(
        segments: Sequence[Sequence[int]],
        tree: Tree,
        answer_offsets: Sequence[int] | None = None,
        targets: Sequence[Sequence[bool] | Mask] | None = None,
    ) -> Tokens:
        """A sample from plain lists, main first, as `of` makes one. Raises UserError for an empty segment."""
        lengths = np.array(list(map(len, segments)), dtype=np.int64)
        if (lengths[1:] == 0).any():
            empty = int(np.flatnonzero(lengths[1:] == 0)[0])
            raise UserError(
                f"branches[{empty}]: holds no token; give it text, or move the end of main into it"
            )
        ids = np.concatenate([np.asarray(segment, dtype=np.int64) for segment in segments])
        return Tokens(ids, lengths, _target_mask(lengths, answer_offsets, targets), tree)

    @property
    def branches(self) -> int:
        """Number of branches, at all depths."""
        return self.tree.branches

    def split(self) -> list[list[int]]:
        """The ids of every segment."""
        return [segment.tolist() for segment in np.split(self.ids, np.cumsum(self.lengths)[:-1])]

    def places(self, kept: Ints) -> Ints:
        """The indices into `ids` of the tokens of the kept segments. kept: their numbers, ascending."""
        lengths = self.lengths[kept]
        shifts = np.cumsum(self.lengths)[kept] - np.cumsum(lengths)
        return np.arange(lengths.sum()) + np.repeat(shifts, lengths)

    def take(self, kept: Ints) -> Tokens:
        """The sample of the kept segments. kept: as `Tree.take` takes them."""
        places = self.places(kept)
        return Tokens(self.ids[places], self.lengths[kept], self.targets[places], self.tree.take(kept))


def _target_mask(
    lengths: Ints, answer_offsets: Sequence[int] | None, targets: Sequence[Sequence[bool] | Mask] | None
) -> Mask:
    """`[total]` targets of a sample, with the arguments of `Tokens.of_tree`."""
    starts = np.cumsum(lengths) - lengths
    if targets is None:
        offsets = np.asarray(0 if answer_offsets is None else answer_offsets, dtype=np.int64)
        first_targets = np.concatenate([lengths[:1], np.broadcast_to(offsets, len(lengths) - 1)])
        mask = np.arange(lengths.sum()) >= np.repeat(starts + first_targets, lengths)
    else:
        mask = np.concatenate([np.zeros(lengths[0], bool), *(np.asarray(own, bool) for own in targets)])
    mask[starts[1:]] = False
    return mask


@dataclass(frozen=True, slots=True)
class Layout:
    """One sample in physical order; every array is `[tokens]`.

    segment: the number of the token's segment, 0 for main. branch, time: the pos2d coordinates. position: the
    position of pairs that pos2d does not drive. labels: the token that each token predicts, or -100. tree:
    the shape of the sample.
    """

    ids: Ints
    segment: Ints
    branch: Ints
    time: Ints
    position: Ints
    labels: Ints
    tree: Tree


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of padded layouts: all `[rows, seq]`, pos2d `[rows, seq, 2]`.

    segment: -1 for padding. relations: `[rows, segments + 1, segments + 1]` int8, the relation of the key's
    segment (column) to the query's (row); index -1, padding, is unrelated to everything. branches: number of
    branches. is_flat: whether every row is one sample of main and branches alone.
    """

    ids: Ints
    segment: Ints
    pos2d: Ints
    position: Ints
    labels: Ints
    relations: NDArray[np.int8]
    branches: int
    is_flat: bool

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int((self.segment != PADDING).sum())

    @property
    def targets(self) -> int:
        """Number of tokens that have a label."""
        return int((self.labels != IGNORE).sum())


def start_times(lengths: Ints, tree: Tree, align_to: Alignment, delays: Ints | None = None) -> Ints:
    """`[segments]` time coordinates of the first token of every segment.

    A branch starts `branch_shifts` after its parent ends. A reduce starts at the latest end of all that it
    joins. delays: `[branches]` time steps added before each branch; none by default.
    """
    shifts = branch_shifts(lengths, tree, align_to)
    if delays is not None:
        shifts[tree.is_branch] += delays
    if tree.is_flat:
        shifts[1:] += lengths[MAIN]
        return shifts
    starts, ends, length_of, shift_of = [0], [int(lengths[MAIN])], lengths.tolist(), shifts.tolist()
    for segment, parent, joined in tree.walk():
        start = max(ends[joined.start : joined.stop]) if joined else ends[parent] + shift_of[segment]
        starts.append(start)
        ends.append(start + length_of[segment])
    return np.array(starts)


def branch_shifts(lengths: Ints, tree: Tree, align_to: Alignment) -> Ints:
    """`[segments]` time steps between the end of a segment and the start of a branch that continues it.

    A document starts where the one before it ends. Other branches start at once, or with align_to=right, if
    they do not fork, so that they end together.
    """
    documents = slice(1, 1 + tree.documents)
    shifts = np.zeros(len(lengths), dtype=np.int64)
    if align_to == "right":
        shifts += _shifts_to_the_right(lengths, tree, documents)
    shifts[documents] = np.cumsum(lengths[documents]) - lengths[documents]
    return shifts


def _shifts_to_the_right(lengths: Ints, tree: Tree, documents: slice) -> Ints:
    """`[segments]` time steps by which a branch is shorter than its longest sibling, if neither forks."""
    forks = np.zeros(len(lengths), dtype=bool)
    forks[tree.parents[1:]] = True
    is_leaf = tree.is_branch & ~forks
    is_leaf[documents] = False
    longest = np.zeros(len(lengths), dtype=np.int64)
    np.maximum.at(longest, tree.parents[is_leaf], lengths[is_leaf])
    return np.where(is_leaf, longest[tree.parents] - lengths, 0)


def arrange(tokens: Tokens, config: RopeConfig, delays: Ints | None = None) -> Layout:
    """Place every token of one sample.

    delays: `[branches]` time steps added before each branch (the random time offset); none by default.
    """
    return place(tokens, start_times(tokens.lengths, tokens.tree, config.align_to, delays), config)


def place(tokens: Tokens, starts: Ints, config: RopeConfig) -> Layout:
    """Place every token of one sample whose segments start at these times. starts: `[segments]`."""
    lengths, tree = tokens.lengths, tokens.tree
    segment = np.repeat(np.arange(len(lengths)), lengths)
    index = np.arange(len(segment)) - (np.cumsum(lengths) - lengths)[segment]  # within its own segment
    time = starts[segment] + index
    labels = next_token_labels(tokens)
    order = physical_order(time, segment, config)
    time, segment = time[order], segment[order]
    return Layout(
        ids=tokens.ids[order],
        segment=segment,
        branch=branch_coordinates(tree, bool(lengths[MAIN]), config.branch_stride)[segment],
        time=time,
        position=time if config.positions == "time" else np.arange(len(time)),
        labels=labels[order],
        tree=tree,
    )


def next_token_labels(tokens: Tokens) -> Ints:
    """`[tokens]` labels in logical order: a target is the label of the token before it."""
    labels = np.full(len(tokens.ids), IGNORE)
    is_target = tokens.targets[1:]
    labels[:-1][is_target] = tokens.ids[1:][is_target]
    return labels


def physical_order(time: Ints, segment: Ints, config: RopeConfig) -> Ints:
    """Indices that sort logical order into physical order.

    Sorting by time, then segment, makes the columnar mask nearly causal. Where neither mask nor positions
    depend on siblings, segments stay one after another, which keeps the isolated mask block-sparse.
    """
    if is_free_order(config):
        return np.arange(len(time))
    return np.lexsort((segment, time))


def is_free_order(config: RopeConfig) -> bool:
    """Whether the order of a branch's tokens is independent of its siblings, in storage and in decoding."""
    return config.visibility == "isolated" and config.positions == "time"


def collate(layouts: Sequence[Layout], pad_id: int, packing: bool = False) -> Batch:
    """Layouts as rows, padded on the right to one length; with packing, as a single row without padding.

    Padding has segment -1, label -100 and coordinates 0. Samples of one row are unrelated.
    """
    rows = [layouts] if packing else [[layout] for layout in layouts]
    lengths = np.array([sum(len(layout.ids) for layout in row) for row in rows])
    is_token = np.arange(lengths.max(initial=0)) < lengths[:, None]  # [rows, seq]
    firsts = [_first_segments(row) for row in rows]

    def pad(arrays: Sequence[Ints], value: int) -> Ints:
        padded = np.full(is_token.shape, value, dtype=np.int64)
        padded[is_token] = np.concatenate(arrays)
        return padded

    def pad_field(name: str, value: int) -> Ints:
        return pad([getattr(layout, name) for layout in layouts], value)

    numbered = zip(layouts, [first for row in firsts for first in row[:-1]], strict=True)
    return Batch(
        ids=pad_field("ids", pad_id),
        segment=pad([layout.segment + first for layout, first in numbered], PADDING),
        pos2d=np.stack([pad_field("branch", 0), pad_field("time", 0)], axis=-1),
        position=pad_field("position", 0),
        labels=pad_field("labels", IGNORE),
        relations=_relations_of_rows(rows, firsts),
        branches=sum(layout.tree.branches for layout in layouts),
        is_flat=not packing and all(layout.tree.is_flat for layout in layouts),
    )


def _first_segments(row: Sequence[Layout]) -> list[int]:
    """The number in its row of the first segment of each layout, and the number of segments of the row."""
    return [0, *np.cumsum([layout.tree.segments for layout in row]).tolist()]


def _relations_of_rows(rows: Sequence[Sequence[Layout]], firsts: Sequence[Sequence[int]]) -> NDArray[np.int8]:
    """`[rows, segments + 1, segments + 1]`, as in `Batch`."""
    size = max((row[-1] for row in firsts), default=0) + 1
    tables = np.full((len(rows), size, size), UNRELATED, dtype=np.int8)
    for table, row, row_firsts in zip(tables, rows, firsts, strict=True):
        for layout, (first, end) in zip(row, pairwise(row_firsts), strict=True):
            table[first:end, first:end] = relations(layout.tree)
    return tables
