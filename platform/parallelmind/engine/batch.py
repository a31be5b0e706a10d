"""One forward pass over many samples: their tokens side by side, and which of them reads which stretch of the
pool.

A *stretch* is some tokens of the step and the keys they choose from; the rule of visibility says which of
these they see. A token may be in several stretches, such as main and its own branch, but no key is in two
stretches of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from parallelmind.config import Visibility
from parallelmind.engine.block_manager import BlockTable
from parallelmind.engine.sequence import ScheduledTokens, SequenceState
from parallelmind.layout import MAIN, Ints
from parallelmind.visibility import RULES, AttentionWindow, effective_penalty, is_sibling


@dataclass(frozen=True, slots=True)
class TokenMeta:
    """slots, time, sequence: `[tokens]`, where tokens lie and what a mask asks about them."""

    slots: Ints
    time: Ints
    sequence: Ints

    @staticmethod
    def of(streams: Sequence[BlockTable]) -> TokenMeta:
        if len(streams) == 1:
            return TokenMeta(streams[0].slots, streams[0].time, streams[0].sequence)
        return TokenMeta(
            *(
                np.concatenate([getattr(each, part) for each in streams])
                for part in ("slots", "time", "sequence")
            )
        )

    def at(self, index: Ints) -> TokenMeta:
        return TokenMeta(self.slots[index], self.time[index], self.sequence[index])


@dataclass(frozen=True, slots=True)
class AttentionSegment:
    """queries: `[n]` indices into the step. asking, keys: the places of these tokens, and of all that they
    choose from.

    own: whether it is a branch of its own that they read, after main. No token is in two stretches of the
    same kind. penalty: taken off the scores of siblings.
    """

    queries: Ints
    asking: TokenMeta
    keys: TokenMeta
    rule: Visibility
    own: bool
    penalty: float

    def bias(self, reach: AttentionWindow) -> NDArray[np.float32]:
        """`[n, keys]`: what is added to the score of each query and key; minus infinity where it is not
        seen.
        """
        away = is_sibling(self.asking.sequence[:, None], self.keys.sequence) if self.penalty else False
        return np.where(
            self.seen(reach), np.where(away, np.float32(-self.penalty), np.float32(0)), np.float32(-np.inf)
        )

    def seen(self, reach: AttentionWindow) -> NDArray[np.bool_]:
        """`[n, keys]`: which key each query sees."""
        q_time, q_sequence, q_slots = (
            part[:, None] for part in (self.asking.time, self.asking.sequence, self.asking.slots)
        )
        seen = RULES[self.rule](q_time, q_sequence, self.keys.time, self.keys.sequence) | (
            q_slots == self.keys.slots
        )
        near = reach.within(q_time, self.keys.time)
        return seen if near is None else seen & near


@dataclass(frozen=True, slots=True)
class ModelInput:
    """ids, branch, time, position, slots: `[tokens]`. rows: `[sampled]` indices of the tokens whose logits
    are wanted.
    """

    ids: Ints
    branch: Ints
    time: Ints
    position: Ints
    slots: Ints
    rows: Ints
    stretches: list[AttentionSegment]

    @staticmethod
    def of(parts: Sequence[tuple[SequenceState, ScheduledTokens, SequenceBlocks]]) -> ModelInput:
        """Enter the feeds of some samples into their streams, side by side."""
        starts = np.cumsum([0, *(len(feed.ids) for _, feed, _ in parts)])
        slots, stretches = [], []
        for start, (decoding, feed, storage) in zip(starts, parts, strict=False):
            slots.append(storage.enter(feed))
            stretches += storage.stretches(
                decoding, TokenMeta(slots[-1], feed.time, feed.sequence), int(start)
            )
        ids, branch, time, position = (
            np.concatenate([getattr(feed, name) for _, feed, _ in parts])
            for name in ("ids", "branch", "time", "position")
        )
        rows = np.concatenate([start + feed.rows for start, (_, feed, _) in zip(starts, parts, strict=False)])
        return ModelInput(ids, branch, time, position, np.concatenate(slots), rows, stretches)


class SequenceBlocks:
    """The streams of one sample: main and, where the order is free, one for each branch; else all of it is
    one stream.
    """

    def __init__(self, trunk: BlockTable, branches: list[BlockTable] | None) -> None:
        self.trunk, self.branches = trunk, branches

    def grow(self, blocks: list[int]) -> None:
        """Blocks for a branch that joins late."""
        if self.branches is None:
            self.trunk.grow(blocks)
        else:
            self.branches.append(BlockTable(blocks))

    @property
    def extent(self) -> int:
        return max(stream.extent for stream in [self.trunk, *(self.branches or [])])

    def enter(self, feed: ScheduledTokens) -> Ints:
        """`[tokens]` slots of the tokens of a feed."""
        if self.branches is None:
            return self.trunk.append(feed.time, feed.sequence)
        slots = []
        for sequence, index in _runs(feed.sequence):
            stream = self.trunk if sequence == MAIN else self.branches[sequence - 1]
            slots.append(stream.append(feed.time[index], feed.sequence[index]))
        return np.concatenate(slots)

    def stretches(self, decoding: SequenceState, places: TokenMeta, start: int) -> list[AttentionSegment]:
        """What the tokens that have just been entered read; `start`: index of the first of them in the
        step.
        """
        queries, rule = np.arange(len(places.slots)), decoding.config.visibility
        taken = effective_penalty(decoding.config)
        wide = np.append(False, decoding.reads_all)[places.sequence]
        found, narrow = [], queries[~wide]
        if wide.any():
            everything = TokenMeta.of([self.trunk, *(self.branches or [])])
            found.append(_stretch(queries[wide], places, everything, "columnar", start, taken))
        if self.trunk.length and len(narrow):
            found.append(_stretch(narrow, places, TokenMeta.of([self.trunk]), rule, start, taken))
        if self.branches is None:
            return found
        for sequence, index in _runs(places.sequence):
            if sequence != MAIN and not decoding.reads_all[sequence - 1]:
                keys = TokenMeta.of([self.branches[sequence - 1]])
                found.append(_stretch(queries[index], places, keys, rule, start, taken, own=True))
        return found


def _stretch(
    queries: Ints,
    places: TokenMeta,
    keys: TokenMeta,
    rule: Visibility,
    start: int,
    penalty: float,
    own: bool = False,
) -> AttentionSegment:
    return AttentionSegment(start + queries, places.at(queries), keys, rule, own, penalty)


def _runs(sequence: Ints) -> list[tuple[int, slice]]:
    """Each sequence of a feed in free order, where its tokens stand side by side, and where they stand."""
    cuts = np.flatnonzero(np.diff(sequence)) + 1
    bounds = [0, *cuts.tolist(), len(sequence)]
    return [(int(sequence[first]), slice(first, last)) for first, last in pairwise(bounds) if last > first]
