"""From samples to coordinates, physical order, labels and batches. NumPy only, without loops over tokens.

A sample is an optional `main` and N branches of token ids. Sequence 0 is always main, which may be empty, and
branches are sequences 1..N, so that a mask can tell main from a branch. The *branch coordinate* counts from
main if there is one and from the first branch otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parallelmind.config import Alignment, RopeConfig
from parallelmind.errors import UserError

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

IGNORE = -100
MAIN = 0
PADDING = -1


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenised sample.

    ids: `[total]` token ids, main first, then the branches one after another.
    lengths: `[1 + N]` numbers of tokens of main (may be 0) and of every branch (at least 1).
    targets: `[total]` whether a token is a target. No token of main is one, and no first token of a branch.
    """

    ids: Ints
    lengths: Ints
    targets: Mask

    @staticmethod
    def of(
        main: Sequence[int],
        branches: Sequence[Sequence[int]],
        answer_offsets: Sequence[int] | None = None,
        targets: Sequence[Sequence[bool] | Mask] | None = None,
    ) -> Tokens:
        """Build from plain lists. Raises UserError for no branch and for an empty branch.

        answer_offsets: index of the first target of each branch. targets: in its place, whether each token of
        each branch is a target. By default, every token of a branch is a target. The first token of a branch
        never is, as no token precedes it.
        """
        if not branches:
            raise UserError("branches=[]: a sample needs at least one branch")
        lengths = np.array([len(main), *map(len, branches)], dtype=np.int64)
        if (lengths[1:] == 0).any():
            empty = int(np.flatnonzero(lengths[1:] == 0)[0])
            raise UserError(
                f"branches[{empty}]: holds no token; give it text, or move the end of main into it"
            )
        ids = np.concatenate([np.asarray(segment, dtype=np.int64) for segment in (main, *branches)])
        return Tokens(ids, lengths, _target_mask(lengths, answer_offsets, targets))

    @property
    def branches(self) -> int:
        """Number of branches."""
        return len(self.lengths) - 1

    def split(self) -> list[list[int]]:
        """The ids of main and of every branch."""
        return [segment.tolist() for segment in np.split(self.ids, np.cumsum(self.lengths)[:-1])]


def _target_mask(
    lengths: Ints, answer_offsets: Sequence[int] | None, targets: Sequence[Sequence[bool] | Mask] | None
) -> Mask:
    """`[total]` targets of a sample, with the arguments of `Tokens.of`."""
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

    sequence: 0 for main, 1..N for the branches. branch, time: the pos2d coordinates. position: the position
    of pairs that pos2d does not drive. labels: the token that each token predicts, or -100.
    """

    ids: Ints
    sequence: Ints
    branch: Ints
    time: Ints
    position: Ints
    labels: Ints


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded layouts: all `[batch, seq]`, pos2d `[batch, seq, 2]`; sequence is -1 for padding."""

    ids: Ints
    sequence: Ints
    pos2d: Ints
    position: Ints
    labels: Ints

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int((self.sequence != PADDING).sum())

    @property
    def targets(self) -> int:
        """Number of tokens that have a label."""
        return int((self.labels != IGNORE).sum())


def branch_coordinates(sequence: Ints, has_main: bool, stride: int) -> Ints:
    """Sequence index × stride. Main is at 0; without a main the first branch is at 0."""
    return (sequence - (0 if has_main else 1)) * stride


def start_times(lengths: Ints, align_to: Alignment) -> Ints:
    """`[1 + N]` time coordinates of the first token of main and of every branch."""
    main, branches = lengths[0], lengths[1:]
    starts = np.full(len(lengths), main)
    if align_to == "right":
        starts[1:] += branches.max(initial=0) - branches
    starts[0] = 0
    return starts


def arrange(tokens: Tokens, config: RopeConfig, delays: Ints | None = None) -> Layout:
    """Place every token of one sample.

    delays: `[N]` time steps added before each branch (the random time offset); none by default.
    """
    lengths = tokens.lengths
    ends = np.cumsum(lengths)
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    index = np.arange(len(sequence)) - (ends - lengths)[sequence]  # within its own sequence
    starts = start_times(lengths, config.align_to)
    if delays is not None:
        starts[1:] += delays
    time = starts[sequence] + index
    labels = next_token_labels(tokens)
    order = physical_order(time, sequence, config)
    time, sequence = time[order], sequence[order]
    return Layout(
        ids=tokens.ids[order],
        sequence=sequence,
        branch=branch_coordinates(sequence, bool(lengths[0]), config.branch_stride),
        time=time,
        position=time if config.positions == "time" else np.arange(len(time)),
        labels=labels[order],
    )


def next_token_labels(tokens: Tokens) -> Ints:
    """`[tokens]` labels in logical order: a target is the label of the token before it."""
    labels = np.full(len(tokens.ids), IGNORE)
    is_target = tokens.targets[1:]
    labels[:-1][is_target] = tokens.ids[1:][is_target]
    return labels


def physical_order(time: Ints, sequence: Ints, config: RopeConfig) -> Ints:
    """Indices that sort logical order into physical order.

    Sorting by time, then sequence, makes the columnar mask nearly causal. Where neither mask nor positions
    depend on siblings, branches stay one after another, which keeps the isolated mask block-sparse.
    """
    if is_free_order(config):
        return np.arange(len(time))
    return np.lexsort((sequence, time))


def is_free_order(config: RopeConfig) -> bool:
    """Whether the order of a branch's tokens is independent of its siblings, in storage and in decoding."""
    return config.visibility == "isolated" and config.positions == "time"


def collate(layouts: Sequence[Layout], pad_id: int) -> Batch:
    """Pad layouts on the right to one length. Padding has sequence -1, label -100 and coordinates 0."""
    lengths = np.array([len(layout.ids) for layout in layouts])
    is_token = np.arange(lengths.max(initial=0)) < lengths[:, None]  # [batch, seq]

    def pad(field: str, value: int) -> Ints:
        padded = np.full(is_token.shape, value, dtype=np.int64)
        padded[is_token] = np.concatenate([getattr(layout, field) for layout in layouts])
        return padded

    return Batch(
        ids=pad("ids", pad_id),
        sequence=pad("sequence", PADDING),
        pos2d=np.stack([pad("branch", 0), pad("time", 0)], axis=-1),
        position=pad("position", 0),
        labels=pad("labels", IGNORE),
    )
