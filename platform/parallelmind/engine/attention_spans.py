"""What the tokens of a forward pass attend to, as spans: a group of tokens, and the block tables they read.

Visibility decides which keys of its tables a token attends to. A token may be in several spans, such as those
of main and of its own branch, but the tables of these have no token in common.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import numpy as np
from numpy.typing import NDArray

from parallelmind.engine.block_table import EMPTY_ROW, Int32s
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.tree import MAIN, Mask

NO_SCORES = -1


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpans:
    """Spans of one or more samples.

    level: `[spans]` a token is in at most one span of each level.
    query_start: `[spans + 1]` the first query of each span. queries: `[queries]` indices of tokens.
    table_start: `[spans + 1]` the first table of each span. tables: `[tables]` rows of `BlockTables`.
    score: `[spans]` index in `scores`; negative for a span of which every key is visible and none has a
        summand.
    scores: tables `[segments, segments]` of summands for a query's and a key's segment of the sample.
    """

    level: Int32s
    query_start: Int32s
    queries: Int32s
    table_start: Int32s
    tables: Int32s
    score: Int32s
    scores: tuple[NDArray[np.float32], ...] = ()

    def __len__(self) -> int:
        return len(self.level)

    def within(self, start: int, end: int) -> tuple[AttentionSpans, Mask]:
        """The spans of the tokens from `start` to `end`, which are counted from `start`.

        Also `[tables]` which of the tables are theirs.
        """
        first = self.queries[self.query_start[:-1]]
        is_own = (start <= first) & (first < end)
        queries, tables = np.diff(self.query_start), np.diff(self.table_start)
        is_own_table = np.repeat(is_own, tables)
        spans = AttentionSpans(
            level=self.level[is_own],
            query_start=_starts(queries[is_own]),
            queries=self.queries[np.repeat(is_own, queries)] - np.int32(start),
            table_start=_starts(tables[is_own]),
            tables=self.tables[is_own_table],
            score=self.score[is_own],
            scores=self.scores,
        )
        return spans, is_own_table


def free_order_spans(group: SequenceGroup, segment: Sequence[int]) -> AttentionSpans:
    """Spans of scheduled tokens of a sample in free order: each table is read by all tokens behind it.

    segment: the segment of each token. The tables have room for the tokens.
    """
    shape, readers = group.shape, defaultdict[int, list[int]](list)
    for token, number in enumerate(segment):
        for read in shape.paths[number]:
            if shape.reads[number, read]:
                readers[read].append(token)
    level, queries, tables = list[int](), list[list[int]](), list[list[int]]()
    for read, tokens in readers.items():
        rows = [group.segments[number].table.row for number in (*shape.joined[read], read)]
        if rows := [row for row in rows if row != EMPTY_ROW]:
            level.append(len(shape.paths[read]) - 1)
            queries.append(tokens)
            tables.append(rows)
    return make_spans(level, queries, tables)


def column_order_spans(group: SequenceGroup, num_tokens: int) -> AttentionSpans:
    """One span of all scheduled tokens of a sample in column order: main's table holds all segments."""
    span = make_spans([0], [range(num_tokens)], [[group.segments[MAIN].table.row]])
    return replace(span, score=np.zeros(1, np.int32), scores=(group.shape.scores,))


def side_by_side(parts: Sequence[AttentionSpans], token_starts: Sequence[int]) -> AttentionSpans:
    """The spans of samples whose tokens lie side by side. token_starts: index of the first token of each."""
    if len(parts) == 1:
        return parts[0]
    score_starts = accumulate((len(part.scores) for part in parts), initial=0)
    scores = [
        part.score + start * (part.score >= 0) for part, start in zip(parts, score_starts, strict=False)
    ]
    return AttentionSpans(
        level=_concatenated([part.level for part in parts]),
        query_start=_starts(_concatenated([np.diff(part.query_start) for part in parts])),
        queries=_concatenated(
            [part.queries + start for part, start in zip(parts, token_starts, strict=True)]
        ),
        table_start=_starts(_concatenated([np.diff(part.table_start) for part in parts])),
        tables=_concatenated([part.tables for part in parts]),
        score=_concatenated(scores),
        scores=tuple(chain.from_iterable(part.scores for part in parts)),
    )


def make_spans(
    level: Sequence[int], queries: Sequence[Sequence[int]], tables: Sequence[Sequence[int]]
) -> AttentionSpans:
    """Spans from the level, the queries and the table rows of each, without scores."""
    return AttentionSpans(
        level=np.array(level, np.int32),
        query_start=_starts(list(map(len, queries))),
        queries=np.array(list(chain.from_iterable(queries)), np.int32),
        table_start=_starts(list(map(len, tables))),
        tables=np.array(list(chain.from_iterable(tables)), np.int32),
        score=np.full(len(level), NO_SCORES, np.int32),
    )


def _starts(counts: Sequence[int] | Int32s) -> Int32s:
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def _concatenated(arrays: Sequence[Int32s]) -> Int32s:
    return np.concatenate([np.zeros(0, np.int32), *arrays], dtype=np.int32)
