"""Tokenised records as Arrow tables, to pass them between processes without a Python object per token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from parallelmind.data.packing import TokenRecord
from parallelmind.data.tokenise import TokenisedRecord
from parallelmind.layout import Tokens
from parallelmind.tree import Tree

_TOKEN_COLUMNS = {"ids": pa.int32(), "lengths": pa.int32(), "targets": pa.bool_()}  # fields of `Tokens`
_TREE_COLUMNS = {"parents": pa.int32(), "is_reduce": pa.bool_()}  # fields of `Tree`
_COUNT_COLUMNS = ("truncated", "skipped")
_SCHEMA = pa.schema(
    [
        *((name, pa.list_(kind)) for name, kind in {**_TOKEN_COLUMNS, **_TREE_COLUMNS}.items()),
        ("standalone", pa.bool_()),
        ("documents", pa.int32()),  # of the tree
        *((name, pa.int32()) for name in _COUNT_COLUMNS),
    ]
)


def to_table(records: Iterable[TokenisedRecord]) -> pa.Table:
    """Tokenised records as one table.

    A record without a remaining branch has empty lists. The tree of main and branches alone is null.
    """
    no_ints, no_bools = np.empty(0, np.int64), np.empty(0, bool)
    no_tokens = Tokens(no_ints, no_ints, no_bools, Tree.flat(0))
    columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for record in records:
        tokens = record.tokens or no_tokens
        for name, kind in _TOKEN_COLUMNS.items():
            columns[name].append(getattr(tokens, name).astype(kind.to_pandas_dtype()))
        tree = None if tokens.tree.is_flat else tokens.tree
        for name in _TREE_COLUMNS:
            columns[name].append(None if tree is None else getattr(tree, name))
        columns["documents"].append(tokens.tree.documents)
        for name in ("standalone", *_COUNT_COLUMNS):
            columns[name].append(getattr(record, name))
    return pa.table(columns, schema=_SCHEMA)


def from_tables(tables: Iterable[pa.Table], counts: Counter[str]) -> Iterator[TokenRecord]:
    """The records of the tables. Adds the numbers of truncated and skipped texts to `counts`."""
    for table in tables:
        if not table.num_rows:
            continue
        lists = [_arrays(table.column(name)) for name in (*_TOKEN_COLUMNS, *_TREE_COLUMNS)]
        plain = [table.column(name).to_pylist() for name in ("standalone", "documents")]
        for *arrays, standalone, documents in zip(*lists, *plain, strict=True):
            if len(arrays[0]):
                ids, lengths, targets, parents, is_reduce = arrays
                tree = Tree(parents, is_reduce, documents) if len(parents) else Tree.flat(len(lengths) - 1)
                yield TokenRecord(Tokens(ids, lengths, targets, tree), standalone)
        for name in _COUNT_COLUMNS:
            counts[name] += int(np.sum(table.column(name).to_numpy()))


def _arrays(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    """One array of int64 or bool per row of a list column."""
    combined = column.combine_chunks()
    values = combined.values.to_numpy(zero_copy_only=False)
    values = values if values.dtype == bool else values.astype(np.int64)
    return [values[start:end] for start, end in pairwise(combined.offsets.to_pylist())]
