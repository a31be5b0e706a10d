"""What the tokens of a forward pass attend to, as tiles: a block table, and a few tokens that read it.

A kernel computes one tile as a dense product. Keys that several branches read, such as those of main, are
therefore read once for all branches of a tile. NumPy only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from parallelmind.engine.batch import ModelInput
from parallelmind.tree import Ints, Mask

TILE = 16  # tokens; the smallest number of rows that tensor cores multiply
NO_PART = -1


class Tiles(NamedTuple):
    """The spans of a forward pass, cut into tiles of one block table and at most `TILE` tokens.

    span: `[tiles]` the span of each tile. queries: `[tiles, TILE]` indices of tokens; 0 where there is none.
    blocks: `[tiles, width]` cache blocks of each table, in the order of its tokens.
    filled: `[tiles, width]` how many of the first slots of each block hold tokens of the table; 0 behind the
        last block. num_blocks: `[tiles]`.
    parts: `[tokens, parts]` rows of the flattened `queries` that hold each token: the keys of the token are
        divided among them. `NO_PART` behind the last one.
    """

    span: Ints
    queries: Ints
    blocks: Ints
    filled: Ints
    num_blocks: Ints
    parts: Ints

    @staticmethod
    def of(inputs: ModelInput) -> Tiles:
        """The tiles of a forward pass. Reads the tables' blocks, which only the step thread writes."""
        spans = inputs.spans
        table_span = np.repeat(np.arange(len(spans)), np.diff(spans.table_start))
        first, end = (spans.query_start[table_span + offset].astype(np.int64) for offset in (0, 1))
        counts = -(-(end - first) // TILE)
        table = np.repeat(np.arange(len(table_span)), counts)
        index = np.arange(len(table)) - np.repeat(np.cumsum(counts) - counts, counts)  # within the table
        position = (first[table] + TILE * index)[:, None] + np.arange(TILE)
        is_real = position < end[table, None]
        queries = np.where(is_real, spans.queries[np.where(is_real, position, 0)], 0)
        return Tiles(
            table_span[table],
            queries,
            *_blocks(inputs, spans.tables[table].astype(np.int64), inputs.num_keys[table]),
            _parts(queries, is_real, len(inputs.ids)),
        )


def _blocks(inputs: ModelInput, rows: Ints, num_keys: Ints) -> tuple[Ints, Ints, Ints]:
    """`blocks`, `filled` and `num_blocks` of the first `num_keys` tokens of each table."""
    ends = inputs.tables.ends[rows]
    num_blocks = (ends >= num_keys[:, None]).argmax(axis=1) + 1
    width = int(num_blocks.max())
    is_used = np.arange(width) < num_blocks[:, None]
    ends = np.minimum(ends[:, :width], num_keys[:, None])
    filled = np.where(is_used, np.diff(ends, axis=1, prepend=0), 0)
    return np.where(is_used, inputs.tables.blocks[rows, :width], 0), filled, num_blocks


def _parts(queries: Ints, is_real: Mask, num_tokens: int) -> Ints:
    rows = np.flatnonzero(is_real)
    tokens = queries.ravel()[rows]
    order = np.argsort(tokens, kind="stable")
    counts = np.bincount(tokens, minlength=num_tokens)
    index = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)  # among those of the token
    parts = np.full((num_tokens, int(counts.max())), NO_PART)
    parts[tokens[order], index] = rows[order]
    return parts
