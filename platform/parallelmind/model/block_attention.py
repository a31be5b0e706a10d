"""Attention of whole sequences by blocks of queries, each over the keys that one of its queries sees.

SDPA on a CPU computes every pair of a dense mask, visible or not. In a tree, and in a row of several samples,
few pairs are visible: a block of queries reads the segments on its path, and nothing of another sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from parallelmind.model.hf_compat import AttentionBackend

QUERIES = 128  # of a block


@dataclass(slots=True)
class _Block:
    """queries: of one row. keys: those that one of the queries sees. bias: `[queries, keys]`."""

    queries: slice
    keys: slice | Tensor
    bias: Tensor
    _repeated: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def read(self, states: Tensor) -> Tensor:
        """`[kv heads, keys, dim]` of the keys among `[kv heads, tokens, dim]`."""
        return states[:, self.keys] if isinstance(self.keys, slice) else states.index_select(1, self.keys)

    def repeated_bias(self, group: int, dtype: torch.dtype) -> Tensor:
        """`[group * queries, keys]`, one tensor for all layers."""
        if (group, dtype) not in self._repeated:
            self._repeated[group, dtype] = self.bias.to(dtype).repeat(group, 1)
        return self._repeated[group, dtype]


class BlockAttention(AttentionBackend):
    """Attention with the bias of each row, `[tokens, tokens]`, which is given by blocks of queries."""

    def __init__(self, rows: Sequence[Iterable[Tensor]]) -> None:
        """rows: for each row, the `[QUERIES, tokens]` bias of every block; minus infinity: not visible."""
        self._rows = [_blocks(row) for row in rows]
        super().__init__(self._rows[0][-1].queries.stop)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        group = query.shape[1] // key.shape[1]
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast converts the inputs of SDPA only
        # [rows, kv heads, group, tokens, dim]: the query heads of a group share a key
        query = query.unflatten(1, (key.shape[1], group))
        sinks = None if sinks is None else sinks.view(key.shape[1], group)
        rows = []
        for number, blocks in enumerate(self._rows):
            parts = []
            for block in blocks:
                keys, values = (block.read(states[number]) for states in (key, value))
                queries = query[number][:, :, block.queries]
                parts.append(_attend(queries, keys, values, block, scale, softcap, sinks))
            rows.append(torch.cat(parts, dim=2))
        return torch.stack(rows).flatten(1, 2).transpose(1, 2).contiguous()  # [rows, tokens, heads, dim]


def _blocks(biases: Iterable[Tensor]) -> list[_Block]:
    """The blocks of one row."""
    blocks: list[_Block] = []
    first = 0
    for bias in biases:
        seen = (bias > -torch.inf).any(dim=0).nonzero().flatten()
        bias = bias[:, seen].clamp(min=torch.finfo(bias.dtype).min)
        blocks.append(_Block(slice(first, first + len(bias)), _as_slice(seen), bias))
        first += len(bias)
    return blocks


def _as_slice(indices: Tensor) -> slice | Tensor:
    """Ascending indices as a slice if they are adjacent: reading a slice copies nothing."""
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: _Block,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`[kv heads, group, queries, dim]` of queries of this shape, and of `[kv heads, keys, dim]`.

    sinks: `[kv heads, group]`.
    """
    group = query.shape[1]
    if softcap is None and sinks is None:
        states = query.flatten(1, 2)[None], key[None], value[None]
        bias = block.repeated_bias(group, query.dtype)
        out = F.scaled_dot_product_attention(*states, attn_mask=bias, scale=scale)
        return out[0].unflatten(1, (group, -1))
    scores = torch.einsum("hgqd,hkd->hgqk", query, key).float() * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores + block.bias.float()
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        column = sinks.float()[:, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("hgqk,hkd->hgqd", weights.to(value.dtype), value)
