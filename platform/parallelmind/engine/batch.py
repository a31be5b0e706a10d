"""Input of one forward pass over many samples: their tokens side by side, and what each token attends to.

An *attention segment* is a group of tokens of the batch and a set of keys; the visibility decides which of
these keys each token attends to. A token may be in several segments, such as main and its own branch, but the
segments of one token have no key in common.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parallelmind.engine.block_manager import BlockTable
from parallelmind.engine.planner import ScheduledGroup
from parallelmind.tree import MAIN, Ints
from parallelmind.visibility import AttentionWindow

PADDING = -1  # the slot of a token that is not written to the cache


class TokenMeta(NamedTuple):
    """Metadata for masks: `[tokens]` cache slots, time coordinates and segment numbers."""

    slots: Ints
    time: Ints
    segment: Ints

    @staticmethod
    def of(tables: Sequence[BlockTable]) -> TokenMeta:
        """All tokens of these block tables, those of the running forward pass included."""
        if len(tables) == 1:
            return TokenMeta(*tables[0].staged())
        parts = zip(*(table.staged() for table in tables), strict=True)
        return TokenMeta(*map(np.concatenate, parts))

    def at(self, index: Ints | slice) -> TokenMeta:
        return TokenMeta(self.slots[index], self.time[index], self.segment[index])


class AttentionSegment(NamedTuple):
    """A group of tokens of the batch, and a set of keys from which visibility selects for each of them.

    query_indices: `[queries]` indices into the batch.
    queries: `[queries]` metadata of these tokens.
    keys: `[keys]` metadata of the tokens in the cache.
    scores: `[segments, segments]` summand of the scores for a query's and a key's segment of the sample.
    level: depth of the keys' segment. A token of the batch is in at most one segment of each level.
    """

    query_indices: Ints
    queries: TokenMeta
    keys: TokenMeta
    scores: NDArray[np.float32]
    level: int = 0

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

    ids, segment, branch, time, position: `[tokens]`, as in `ScheduledTokens`.
    slots: `[tokens]` cache slots that the tokens are written to.
    logits_indices: `[sampled + labels]` tokens whose logits are needed: first those of all samples that are
        sampled from, then those before labels.
    adapters: versions of the samples' adapters. adapter: `[tokens]` index of each token's version.
    """

    ids: Ints
    segment: Ints
    branch: Ints
    time: Ints
    position: Ints
    slots: Ints
    logits_indices: Ints
    segments: list[AttentionSegment]
    adapters: tuple[str, ...]
    adapter: Ints

    @staticmethod
    def of(scheduled: Sequence[ScheduledGroup]) -> ModelInput:
        """Lay the tokens of samples side by side."""
        starts = np.cumsum([0, *(len(item.tokens.ids) for item in scheduled)])[:-1].tolist()
        placed = list(zip(starts, scheduled, strict=True))
        segments = [segment for start, item in placed for segment in attention_segments(item, start)]
        indices = [start + item.tokens.logits_indices for start, item in placed]
        indices += [start + item.tokens.labels.logits_indices for start, item in placed]
        adapters = tuple(dict.fromkeys(item.group.adapter_version for item in scheduled))
        adapter = [adapters.index(item.group.adapter_version) for item in scheduled]
        return ModelInput(
            ids=np.concatenate([item.tokens.ids for item in scheduled]),
            segment=np.concatenate([item.tokens.segment for item in scheduled]),
            branch=np.concatenate([item.tokens.branch for item in scheduled]),
            time=np.concatenate([item.tokens.time for item in scheduled]),
            position=np.concatenate([item.tokens.position for item in scheduled]),
            slots=np.concatenate([item.slots for item in scheduled]),
            logits_indices=np.concatenate(indices),
            segments=segments,
            adapters=adapters,
            adapter=np.repeat(adapter, [len(item.tokens.ids) for item in scheduled]),
        )

    def padded(self, tokens: int = 2, sampled: int = 2) -> ModelInput:
        """The input with at least this many tokens and sampled ones.

        Padding has no slot, no segment and no key, and the logits of the first token are repeated.
        """
        num_tokens, num_sampled = max(tokens - len(self.ids), 0), max(sampled - len(self.logits_indices), 0)
        if not (num_tokens or num_sampled):
            return self
        return replace(
            self,
            ids=np.pad(self.ids, (0, num_tokens)),
            segment=np.pad(self.segment, (0, num_tokens)),
            branch=np.pad(self.branch, (0, num_tokens)),
            time=np.pad(self.time, (0, num_tokens)),
            position=np.pad(self.position, (0, num_tokens)),
            slots=np.pad(self.slots, (0, num_tokens), constant_values=PADDING),
            logits_indices=np.pad(self.logits_indices, (0, num_sampled)),
            adapter=np.pad(self.adapter, (0, num_tokens)),
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
            segment=self.segment[tokens],
            branch=self.branch[tokens],
            time=self.time[tokens],
            position=self.position[tokens],
            slots=self.slots[tokens],
            logits_indices=self.logits_indices[is_own] - start,
            segments=[
                segment._replace(query_indices=segment.query_indices - start)
                for segment in self.segments
                if start <= segment.query_indices[0] < end
            ],
            adapters=self.adapters,
            adapter=self.adapter[tokens],
        )


def attention_segments(item: ScheduledGroup, start: int) -> list[AttentionSegment]:
    """Segments of a sample's scheduled tokens. start: index of the first of these tokens in the batch.

    In column order there is one, of all tokens. In free order the tokens of each segment of the sample, and
    of what it joins, are keys for all tokens on whose paths it lies.
    """
    group, tokens, shape = item.group, item.tokens, item.group.shape
    queries = TokenMeta(item.slots, tokens.time, tokens.segment)
    index = np.arange(start, start + len(item.slots))
    if not group.free_order:
        keys = TokenMeta.of([group.segments[MAIN].table])
        return [AttentionSegment(index, queries, keys, shape.scores)]
    readers: dict[int, list[slice]] = defaultdict(list)
    for number, run in segment_runs(tokens.segment):
        for read in shape.paths[number]:
            readers[read].append(run)
    segments = []
    for read, runs in readers.items():
        tables = [group.segments[number].table for number in (*shape.joined[read], read)]
        if any(table.num_staged for table in tables):
            where, level = _merged(runs), len(shape.paths[read]) - 1
            keys = TokenMeta.of(tables)
            segments.append(AttentionSegment(index[where], queries.at(where), keys, shape.scores, level))
    return segments


def segment_runs(segment: Ints) -> list[tuple[int, slice]]:
    """Runs of equal values: the tokens of each segment, which stand side by side in free order."""
    if len(numbers := segment.tolist()) == len(set(numbers)):
        return [(number, slice(index, index + 1)) for index, number in enumerate(numbers)]
    cuts = (np.flatnonzero(np.diff(segment)) + 1).tolist()
    firsts = segment[[0, *cuts]].tolist()
    bounds = pairwise([0, *cuts, len(segment)])
    return [(first, slice(*run)) for first, run in zip(firsts, bounds, strict=True)]


def _merged(runs: Sequence[slice]) -> Ints | slice:
    """The tokens of ascending runs: a slice if they are adjacent, which costs no copy."""
    if len(runs) == 1:
        return runs[0]
    if all(left.stop == right.start for left, right in pairwise(runs)):
        return slice(runs[0].start, runs[-1].stop)
    return np.concatenate([np.arange(run.start, run.stop) for run in runs])
