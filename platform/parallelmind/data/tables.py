"""Tokenised records as Arrow lists, in which they travel: no Python object per token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from parallelmind.data.packing import Row
from parallelmind.layout import Tokens

if TYPE_CHECKING:
    from parallelmind.data.tokenise import Tokenised

_ROWS = pa.schema([("ids", pa.list_(pa.int32())), ("lengths", pa.list_(pa.int32())), ("answer_offsets", pa.list_(pa.int32())),
                   ("lone", pa.bool_()), ("truncated", pa.int32()), ("skipped", pa.int32())])  # fmt: skip


def to_table(tokenised: Iterable[tuple[Tokenised, bool]]) -> pa.Table:
    """Tokenised records as Arrow lists; a record without a branch left has empty ones."""
    none = Tokens(*(np.empty(0, np.int64) for _ in range(3)))
    columns: dict[str, list[Any]] = {name: [] for name in _ROWS.names}
    for item, lone in tokenised:
        tokens = item.tokens or none
        for name in ("ids", "lengths", "answer_offsets"):
            columns[name].append(getattr(tokens, name).astype(np.int32))
        for name, value in (("lone", lone), ("truncated", item.truncated), ("skipped", item.skipped)):
            columns[name].append(value)
    return pa.table(columns, schema=_ROWS)


def to_rows(tables: Iterable[pa.Table], counts: Counter[str]) -> Iterator[Row]:
    """The records of Arrow tables; adds what was truncated and skipped to `counts`."""
    for table in tables:
        if not table.num_rows:
            continue
        lists = [_arrays(table.column(name)) for name in ("ids", "lengths", "answer_offsets")]
        for *parts, lone in zip(*lists, table.column("lone").to_pylist(), strict=True):
            if len(parts[0]):
                yield Row(Tokens(*parts), lone)
        for name in ("truncated", "skipped"):
            counts[name] += int(np.sum(table.column(name).to_numpy()))


def _arrays(column: pa.ChunkedArray) -> list[Any]:
    """One integer array per row of a list column."""
    combined = column.combine_chunks()
    offsets = combined.offsets.to_numpy()
    return np.split(
        combined.values.to_numpy().astype(np.int64)[offsets[0] : offsets[-1]], (offsets - offsets[0])[1:-1]
    )
