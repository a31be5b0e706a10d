"""Input of one forward pass over many samples: their tokens side by side, and what each token attends to.

An *attention segment* is a group of tokens of the batch and a set of keys; the visibility decides which of
these keys each token attends to. A token may be in several segments, such as main and its own branch, but the
segments of one token have no key in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from parallelmind.config import Visibility
from parallelmind.engine.block_manager import BlockTable
from parallelmind.engine.scheduler import ScheduledGroup
from parallelmind.engine.sequence_group import SequenceGroup, sequence_runs
from parallelmind.layout import MAIN, Ints
from parallelmind.visibility import RULES, AttentionWindow, effective_penalty, is_sibling


@dataclass(frozen=True, slots=True)
class TokenMeta:
    """Metadata for masks: `[tokens]` cache slots, time coordinates and sequence numbers."""

    slots: Ints
    time: Ints
    sequence: Ints

    @staticmethod
    def of(tables: Sequence[BlockTable]) -> TokenMeta:
        """All tokens of these block tables."""
        if len(tables) == 1:
            return TokenMeta(tables[0].slots, tables[0].time, tables[0].sequence)
        return TokenMeta(
            np.concatenate([table.slots for table in tables]),
            np.concatenate([table.time for table in tables]),
            np.concatenate([table.sequence for table in tables]),
        )

    def at(self, index: Ints) -> TokenMeta:
        return TokenMeta(self.slots[index], self.time[index], self.sequence[index])


@dataclass(frozen=True, slots=True)
class AttentionSegment:
    """A group of tokens of the batch, and a set of keys from which visibility selects for each of them.

    query_indices: `[queries]` indices into the batch.
    queries: `[queries]` metadata of these tokens.
    keys: `[keys]` metadata of the tokens in the cache.
    penalty: subtracted from the scores of sibling keys.
    own_branch: whether the keys are those of the queries' own branch, stored apart from main. A token is in
        at most one segment for each value.
    """

    query_indices: Ints
    queries: TokenMeta
    keys: TokenMeta
    visibility: Visibility
    penalty: float
    own_branch: bool = False

    def bias(self, window: AttentionWindow) -> NDArray[np.float32]:
        """`[queries, keys]` summand of the scores; minus infinity where the key is not visible."""
        visible = self.is_visible(window)
        if not self.penalty:
            return np.where(visible, np.float32(0), np.float32(-np.inf))
        sibling = is_sibling(self.queries.sequence[:, None], self.keys.sequence)
        seen = np.where(sibling, np.float32(-self.penalty), np.float32(0))
        return np.where(visible, seen, np.float32(-np.inf))

    def is_visible(self, window: AttentionWindow) -> NDArray[np.bool_]:
        """`[queries, keys]` whether the query attends to the key."""
        time, sequence = self.queries.time[:, None], self.queries.sequence[:, None]
        visible = RULES[self.visibility](time, sequence, self.keys.time, self.keys.sequence)
        visible = visible | (self.queries.slots[:, None] == self.keys.slots)
        in_window = window.within(time, self.keys.time)
        return visible if in_window is None else visible & in_window


@dataclass(frozen=True, slots=True)
class ModelInput:
    """Tokens of all samples of one forward pass, side by side.

    ids, branch, time, position: `[tokens]`, as in `ScheduledTokens`.
    slots: `[tokens]` cache slots that the tokens are written to.
    logits_indices: `[sampled]` tokens whose logits are needed.
    """

    ids: Ints
    branch: Ints
    time: Ints
    position: Ints
    slots: Ints
    logits_indices: Ints
    segments: list[AttentionSegment]

    @staticmethod
    def of(scheduled: Sequence[ScheduledGroup]) -> ModelInput:
        """Assign cache slots to the scheduled tokens and lay the samples side by side."""
        starts = np.cumsum([0, *(len(tokens.ids) for _, tokens in scheduled)])[:-1].tolist()
        slots, segments = [], []
        for start, (group, tokens) in zip(starts, scheduled, strict=True):
            slots.append(group.assign_slots(tokens))
            queries = TokenMeta(slots[-1], tokens.time, tokens.sequence)
            segments += attention_segments(group, queries, start)
        indices = [
            start + tokens.logits_indices for start, (_, tokens) in zip(starts, scheduled, strict=True)
        ]
        return ModelInput(
            ids=np.concatenate([tokens.ids for _, tokens in scheduled]),
            branch=np.concatenate([tokens.branch for _, tokens in scheduled]),
            time=np.concatenate([tokens.time for _, tokens in scheduled]),
            position=np.concatenate([tokens.position for _, tokens in scheduled]),
            slots=np.concatenate(slots),
            logits_indices=np.concatenate(indices),
            segments=segments,
        )

    def split(self, lengths: Sequence[int]) -> list[ModelInput]:
        """The input of each sample alone. lengths: the tokens of each."""
        bounds = pairwise(np.cumsum([0, *lengths]).tolist())
        return [self._part(start, end) for start, end in bounds]

    def _part(self, start: int, end: int) -> ModelInput:
        tokens = slice(start, end)
        is_own = (self.logits_indices >= start) & (self.logits_indices < end)
        return ModelInput(
            ids=self.ids[tokens],
            branch=self.branch[tokens],
            time=self.time[tokens],
            position=self.position[tokens],
            slots=self.slots[tokens],
            logits_indices=self.logits_indices[is_own] - start,
            segments=[
                replace(segment, query_indices=segment.query_indices - start)
                for segment in self.segments
                if start <= segment.query_indices[0] < end
            ],
        )


def attention_segments(group: SequenceGroup, queries: TokenMeta, start: int) -> list[AttentionSegment]:
    """Segments of a sample's tokens, which have their slots already.

    start: index of the first of these tokens in the batch.
    """
    visibility, penalty = group.config.visibility, effective_penalty(group.config)
    main_table, *branch_tables = group.block_tables
    reads_all = np.array([False, *(branch.reads_all for branch in group.branches)])[queries.sequence]
    index = np.arange(len(queries.slots))

    def segment(index: Ints, keys: TokenMeta, visibility: Visibility, own: bool = False) -> AttentionSegment:
        return AttentionSegment(start + index, queries.at(index), keys, visibility, penalty, own)

    segments = []
    if reads_all.any():
        all_tokens = TokenMeta.of([main_table, *branch_tables])
        segments.append(segment(index[reads_all], all_tokens, "columnar"))
    if main_table.length and not reads_all.all():
        segments.append(segment(index[~reads_all], TokenMeta.of([main_table]), visibility))
    if not group.free_order:
        return segments
    for sequence, run in sequence_runs(queries.sequence):
        if sequence != MAIN and not reads_all[run.start]:
            own_tokens = TokenMeta.of([branch_tables[sequence - 1]])
            segments.append(segment(index[run], own_tokens, visibility, own=True))
    return segments
