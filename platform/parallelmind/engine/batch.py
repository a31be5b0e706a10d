"""Input of one forward pass over many samples: their tokens side by side, and what each token attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from parallelmind.engine.attention_spans import (
    AttentionSpans,
    column_order_spans,
    free_order_spans,
    make_spans,
    side_by_side,
)
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.block_table import BlockTable, BlockTables
from parallelmind.engine.decode_batch import DecodeStep
from parallelmind.engine.sequence import NO_LABELS
from parallelmind.engine.step_plan import ForwardPlan, ScheduledGroup
from parallelmind.tree import Ints
from parallelmind.visibility import AttentionWindow

PADDING = -1  # the slot of a token that is not written to the cache
_UNSCORED = np.zeros((1, 1), np.float32)


class TokenMeta(NamedTuple):
    """Metadata for masks: `[tokens]` cache slots, time coordinates and segment numbers."""

    slots: Ints
    time: Ints
    segment: Ints

    def at(self, index: Ints | slice) -> TokenMeta:
        return TokenMeta(self.slots[index], self.time[index], self.segment[index])


class AttentionSegment(NamedTuple):
    """A span with its keys: a group of tokens, and keys from which visibility selects for each of them.

    query_indices: `[queries]` indices into the batch.
    queries: `[queries]` metadata of these tokens.
    keys: `[keys]` metadata of the tokens in the cache.
    scores: `[segments, segments]` summand of the scores for a query's and a key's segment of the sample.
    level: depth of the keys' segment. A token of the batch is in at most one segment of each level.
    adapter: index of the version of the sample's adapter.
    """

    query_indices: Ints
    queries: TokenMeta
    keys: TokenMeta
    scores: NDArray[np.float32]
    level: int = 0
    adapter: int = 0

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
    spans: what the tokens attend to. num_keys: `[tables]` keys in each of their tables.
    tables: all block tables of the cache.
    adapters: versions of the samples' adapters. adapter: `[tokens]` index of each token's version.
    """

    ids: Ints
    segment: Ints
    branch: Ints
    time: Ints
    position: Ints
    slots: Ints
    logits_indices: Ints
    spans: AttentionSpans
    num_keys: Ints
    tables: BlockTables
    adapters: tuple[str, ...]
    adapter: Ints

    @staticmethod
    def of(forward: ForwardPlan, tables: BlockTables) -> ModelInput:
        """Lay the staged tokens of samples side by side."""
        parts = [_decoding_part(forward.decoding)] if forward.decoding else []
        parts += map(_part, forward.scheduled)
        starts = list(accumulate((len(part.ids) for part in parts[:-1]), initial=0))
        placed = list(zip(starts, parts, strict=True))
        indices = [start + part.logits_indices for start, part in placed]
        indices += [start + part.label_indices for start, part in placed if len(part.label_indices)]
        spans = side_by_side([part.spans for part in parts], starts)
        versions = [group.adapter_version for group in forward.groups]
        adapters = tuple(dict.fromkeys(versions))
        counts = [count for part in parts for count in part.counts]
        return ModelInput(
            ids=_joined([part.ids for part in parts]),
            segment=_joined([part.segment for part in parts]),
            branch=_joined([part.branch for part in parts]),
            time=_joined([part.time for part in parts]),
            position=_joined([part.position for part in parts]),
            slots=_joined([part.slots for part in parts]),
            logits_indices=_joined(indices),
            spans=spans,
            num_keys=tables.staged[spans.tables],
            tables=tables,
            adapters=adapters,
            adapter=np.repeat([adapters.index(version) for version in versions], counts),
        )

    @property
    def span_adapters(self) -> Ints:
        """`[spans]` index of the version of the adapter of each span's first token."""
        return self.adapter[self.spans.queries[self.spans.query_start[:-1]]]

    @property
    def segments(self) -> list[AttentionSegment]:
        """The spans, each with its keys."""
        tables = pairwise(self.spans.table_start.tolist())
        return [self._segment(span, slice(*bounds)) for span, bounds in enumerate(tables)]

    def _segment(self, span: int, tables: slice) -> AttentionSegment:
        spans = self.spans
        queries = spans.queries[slice(*spans.query_start[span : span + 2])].astype(np.int64)
        rows = zip(spans.tables[tables].tolist(), self.num_keys[tables].tolist(), strict=True)
        slots = np.concatenate([self.tables.slots(row, count) for row, count in rows])
        keys = TokenMeta(slots, self.tables.time[slots], self.tables.segment[slots])
        own = TokenMeta(self.slots, self.time, self.segment).at(queries)
        if (score := spans.score[span]) >= 0:
            adapter = int(self.adapter[queries[0]])
            return AttentionSegment(queries, own, keys, spans.scores[score], int(spans.level[span]), adapter)
        own, keys = (meta._replace(segment=np.zeros_like(meta.slots)) for meta in (own, keys))
        return AttentionSegment(queries, own, keys, _UNSCORED, int(spans.level[span]))

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
        bounds = pairwise(accumulate(lengths, initial=0))
        return [self._part(start, end) for start, end in bounds]

    def _part(self, start: int, end: int) -> ModelInput:
        tokens = slice(start, end)
        is_own = (self.logits_indices >= start) & (self.logits_indices < end)
        spans, is_own_table = self.spans.within(start, end)
        return replace(
            self,
            ids=self.ids[tokens],
            segment=self.segment[tokens],
            branch=self.branch[tokens],
            time=self.time[tokens],
            position=self.position[tokens],
            slots=self.slots[tokens],
            logits_indices=self.logits_indices[is_own] - start,
            spans=spans,
            num_keys=self.num_keys[is_own_table],
            adapter=self.adapter[tokens],
        )


class _Part(NamedTuple):
    """The tokens of some samples; fields as in `ModelInput`.

    label_indices: the tokens before labels. counts: how many tokens each sample has.
    """

    ids: Ints
    segment: Ints
    branch: Ints
    time: Ints
    position: Ints
    slots: Ints
    logits_indices: Ints
    label_indices: Ints
    spans: AttentionSpans
    counts: Sequence[int]


def single_token() -> ModelInput:
    """One token of a single branch, in the first slot."""
    table, tables, zeros = BlockTable(), BlockTables(BLOCK), np.zeros(1, np.int64)
    table.stage(tables, 1, [0])
    return ModelInput(
        ids=zeros,
        segment=zeros + 1,
        branch=zeros,
        time=zeros,
        position=zeros,
        slots=zeros,
        logits_indices=zeros,
        spans=make_spans([0], [[0]], [[table.row]]),
        num_keys=zeros + 1,
        tables=tables,
        adapters=("",),
        adapter=zeros,
    )


def _decoding_part(step: DecodeStep) -> _Part:
    batch = step.batch
    return _Part(
        ids=step.ids,
        segment=batch.number,
        branch=batch.coordinate,
        time=step.time,
        position=step.time,
        slots=step.slots,
        logits_indices=np.arange(len(step.ids)),
        label_indices=NO_LABELS.logits_indices,
        spans=batch.spans,
        counts=[len(sample.branches) for sample in batch.samples],
    )


def _part(item: ScheduledGroup) -> _Part:
    group, tokens = item.group, item.tokens
    if group.free_order:
        spans = free_order_spans(group, tokens.segment.tolist())
    else:
        spans = column_order_spans(group, len(tokens.ids))
    return _Part(
        ids=tokens.ids,
        segment=tokens.segment,
        branch=tokens.branch,
        time=tokens.time,
        position=tokens.position,
        slots=item.slots,
        logits_indices=tokens.logits_indices,
        label_indices=tokens.labels.logits_indices,
        spans=spans,
        counts=[len(tokens.ids)],
    )


def _joined(arrays: Sequence[Ints]) -> Ints:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
