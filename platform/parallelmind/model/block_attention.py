"""Attention of whole sequences by blocks of queries, each over the keys that one of its queries sees.

SDPA on a CPU computes every pair of a dense mask, visible or not. In a tree, and in a row of several samples,
few pairs are visible: a block of queries reads the segments on its path, and nothing of another sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from parallelmind.model.hf_compat import AttentionBackend

QUERIES = 128  # of a block


@dataclass(slots=True)
class Block:
    """keys: those that one of the block's queries sees. bias: `[queries, keys]`."""

    keys: slice | Tensor
    bias: Tensor
    _repeated: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def read(self, states: Tensor) -> Tensor:
        """`[kv heads, keys, dim]` of the keys among `[kv heads, tokens, dim]`."""
        return states[:, self.keys] if isinstance(self.keys, slice) else states.index_select(1, self.keys)

    def add(self, states: Tensor, values: Tensor) -> None:
        """Add values of the shape that `read` returns to the states that it reads."""
        if isinstance(self.keys, slice):
            states[:, self.keys] += values
        else:
            states.index_add_(1, self.keys, values)

    def repeated_bias(self, group: int, dtype: torch.dtype) -> Tensor:
        """`[group * queries, keys]`, one tensor for all layers."""
        if (group, dtype) not in self._repeated:
            self._repeated[group, dtype] = self.bias.to(dtype).repeat(group, 1)
        return self._repeated[group, dtype]


_AttendBlock = Callable[[Tensor, Tensor, Tensor, Block], Tensor]


class BlockAttention(AttentionBackend):
    """Attention with the bias of each row, `[tokens, tokens]`, which is given by blocks of queries."""

    def __init__(self, rows: Sequence[Iterable[Tensor]]) -> None:
        """rows: for each row, the `[QUERIES, tokens]` bias of every block; minus infinity: not visible."""
        self._rows = [make_blocks(row) for row in rows]
        super().__init__(sum(len(block.bias) for block in self._rows[0]))

    @torch.compiler.disable  # its blocks are different in every batch
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast converts the inputs of SDPA only
        query = group_heads(query, 1, key.shape[1])
        sinks = None if sinks is None else group_heads(sinks, 0, key.shape[1])
        if softcap is None and sinks is None:
            attend: _AttendBlock = partial(attend_sdpa, scale=scale)
        else:
            attend = partial(_attend, scale=scale, softcap=softcap, sinks=sinks)
        rows = [
            _attend_row(attend, blocks, *states)
            for blocks, *states in zip(self._rows, query, key, value, strict=True)
        ]
        return torch.stack(rows)


def group_heads(states: Tensor, dim: int, kv_heads: int) -> Tensor:
    """The dimension of query heads divided into `[kv heads, group]`: the heads of a group share a key."""
    return states.unflatten(dim, (kv_heads, -1))


class ReadBlocks(torch.autograd.Function):
    """What every block reads of `[kv heads, tokens, dim]`.

    The backward pass adds all gradients to one tensor; that of a slice fills a new one for each block.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, ...]:
        ctx.blocks, ctx.shape = blocks, states.shape
        return tuple(block.read(states) for block in blocks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_zeros(ctx.shape)
        for block, gradient in zip(ctx.blocks, gradients, strict=True):
            block.add(total, gradient)
        return total, None


def make_blocks(biases: Iterable[Tensor]) -> list[Block]:
    """The blocks of one row. A block has no keys where its queries see none."""
    blocks = []
    for bias in biases:
        seen = (bias > -torch.inf).any(dim=0).nonzero().flatten()
        bias = bias[:, seen].clamp(min=torch.finfo(bias.dtype).min)
        blocks.append(Block(_as_slice(seen), bias))
    return blocks


def _as_slice(indices: Tensor) -> slice | Tensor:
    """Ascending indices as a slice if they are adjacent: reading a slice copies nothing."""
    if len(indices) == 0:
        return slice(0, 0)
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


def _attend_row(
    attend: _AttendBlock, blocks: Sequence[Block], query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """`[tokens, heads, dim]` of `[kv heads, group, tokens, dim]`, and of `[kv heads, tokens, dim]`."""
    queries = query.split([len(block.bias) for block in blocks], dim=2)
    keys, values = (ReadBlocks.apply(states, blocks) for states in (key, value))
    parts = map(attend, queries, keys, values, blocks)
    return torch.cat([part.permute(2, 0, 1, 3) for part in parts]).flatten(1, 2)


def attend_sdpa(query: Tensor, key: Tensor, value: Tensor, block: Block, scale: float) -> Tensor:
    """`[kv heads, group, queries, dim]` of one block, by SDPA.

    Its backward pass shares out batch and heads among threads, so an odd number of heads is read twice, by
    half of the queries each.
    """
    heads, group, queries, _ = query.shape
    halves = gcd(group * queries, 1 + heads % 2)
    states = query.flatten(1, 2).unflatten(1, (halves, -1)).transpose(0, 1)  # [halves, heads, queries, dim]
    key, value = (tensor.expand(halves, -1, -1, -1) for tensor in (key, value))
    bias = block.repeated_bias(group, query.dtype).unflatten(0, (halves, 1, -1))
    out = F.scaled_dot_product_attention(states, key, value, attn_mask=bias, scale=scale)
    return out.transpose(0, 1).reshape(query.shape[:-1] + value.shape[-1:])


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block: Block,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """As `attend_sdpa`, for scores that SDPA does not compute. sinks: `[kv heads, group]`."""
    return attend_biased(query, key, value, block.bias.float(), scale, softcap, sinks)


def attend_biased(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`[kv heads, group, queries, dim]` attention in plain operators, which has gradients for all arguments.

    query: the same shape. key, value: `[kv heads, keys, dim]`. bias: summand of the scores, broadcast to
    `[kv heads, group, queries, keys]`. sinks: `[kv heads, group]`.
    """
    scores = torch.einsum("hgqd,hkd->hgqk", query, key).float() * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        column = sinks.float()[:, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("hgqk,hkd->hgqd", weights.to(value.dtype), value)
