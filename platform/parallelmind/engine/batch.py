"""Input of one forward pass over many samples: their tokens side by side, and what each token attends to.

An *attention segment* is a group of tokens of the batch and a set of keys; the visibility decides which of
these keys each token attends to. A token may be in several segments, such as main and its own branch, but the
segments of one token have no key in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress, pairwise

import numpy as np
from numpy.typing import NDArray

from parallelmind.engine.block_manager import BlockTable
from parallelmind.engine.scheduler import ScheduledGroup
from parallelmind.engine.sequence_group import SequenceGroup, segment_runs
from parallelmind.tree import MAIN, Ints, relations
from parallelmind.visibility import AttentionWindow, relation_scores


@dataclass(frozen=True, slots=True)
class TokenMeta:
    """Metadata for masks: `[tokens]` cache slots, time coordinates and segment numbers."""

    slots: Ints
    time: Ints
    segment: Ints

    @staticmethod
    def of(tables: Sequence[BlockTable]) -> TokenMeta:
        """All tokens of these block tables."""
        if len(tables) == 1:
            return TokenMeta(tables[0].slots, tables[0].time, tables[0].segment)
        return TokenMeta(
            np.concatenate([table.slots for table in tables]),
            np.concatenate([table.time for table in tables]),
            np.concatenate([table.segment for table in tables]),
        )

    def at(self, index: Ints) -> TokenMeta:
        return TokenMeta(self.slots[index], self.time[index], self.segment[index])


@dataclass(frozen=True, slots=True)
class AttentionSegment:
    """A group of tokens of the batch, and a set of keys from which visibility selects for each of them.

    query_indices: `[queries]` indices into the batch.
    queries: `[queries]` metadata of these tokens.
    keys: `[keys]` metadata of the tokens in the cache.
    scores: `[segments, segments]` summand of the scores for a query's and a key's segment of the sample.
    own_branch: whether the keys belong to the queries' branch, apart from main. A token is in at most one
        segment for each value.
    """

    query_indices: Ints
    queries: TokenMeta
    keys: TokenMeta
    scores: NDArray[np.float32]
    own_branch: bool = False

    def bias(self, window: AttentionWindow) -> NDArray[np.float32]:
        """`[queries, keys]` summand of the scores; minus infinity where the key is not visible."""
        time = self.queries.time[:, None]
        is_itself = self.queries.slots[:, None] == self.keys.slots
        visible = (self.keys.time < time) | is_itself
        in_window = window.within(time, self.keys.time)
        if in_window is not None:
            visible = visible & in_window
        scores = self.scores[self.queries.segment[:, None], self.keys.segment]
        return np.where(visible, scores, np.float32(-np.inf))


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
            queries = TokenMeta(slots[-1], tokens.time, tokens.segment)
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
    config, (main_table, *branch_tables) = group.config, group.block_tables
    scores = relation_scores(config.visibility, config.sibling_penalty)[relations(group.tree)]
    index = np.arange(len(queries.slots))

    def attend(queried: Ints, tables: Sequence[BlockTable], own: bool = False) -> AttentionSegment:
        return AttentionSegment(start + queried, queries.at(queried), TokenMeta.of(tables), scores, own)

    segments = [attend(index, [main_table])] if main_table.length else []
    if not group.free_order:
        return segments
    is_read = (scores[:, 1:] > -np.inf).tolist()
    for number, run in segment_runs(queries.segment):
        if number != MAIN:
            read = list(compress(branch_tables, is_read[number]))
            segments.append(attend(index[run], read, own=True))
    return segments
