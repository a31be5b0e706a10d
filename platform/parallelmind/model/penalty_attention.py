"""Attention with a penalty of siblings that each layer and head learns, for whole sequences.

A constant that is subtracted from the scores of some keys is subtracted from their log-sum-exp. So a block of
queries attends to the keys of its own path and to those of siblings apart, and the two results are merged.
No mask depends on the layer or the head, and the gradient of a penalty follows from what has been computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallelmind.model.block_attention import (
    Block,
    ReadBlocks,
    attend_biased,
    attend_sdpa,
    group_heads,
    make_blocks,
)
from parallelmind.model.hf_compat import AttentionBackend, LayerMask
from parallelmind.model.penalty import layer_penalty

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

_Blocks = tuple[list[Block], list[Block]]  # of the queries' own paths, and of their siblings


class DensePenaltyMask(LayerMask):
    """A dense mask for each layer."""

    def __init__(self, own: Tensor, siblings: Tensor) -> None:
        """own, siblings: `[rows, 1, queries, keys]`, 0 where a key is visible, else minus infinity."""
        super().__init__(own.shape[-1])
        self._is_sibling = (siblings == 0).to(own.dtype)
        self._bias = torch.maximum(own, siblings).clamp(min=torch.finfo(own.dtype).min)

    def of_layer(self, attention: nn.Module) -> Tensor:
        """`[rows, heads, queries, keys]` summand of the scores."""
        penalty = layer_penalty(attention).to(self._bias.dtype)
        return self._bias - penalty[:, None, None] * self._is_sibling


class BlockPenaltyMask(LayerMask):
    """Blocks of queries, on a CPU."""

    def __init__(self, rows: Sequence[tuple[Iterable[Tensor], Iterable[Tensor]]]) -> None:
        """rows: for each row, the biases of every block for its own path, and for siblings."""
        self._rows: list[_Blocks] = [(make_blocks(own), make_blocks(siblings)) for own, siblings in rows]
        super().__init__(sum(len(block.bias) for block in self._rows[0][0]))

    @torch.compiler.disable  # the same holds for what it returns
    def of_layer(self, attention: nn.Module) -> AttentionBackend:
        return _PenaltyAttention(self._rows, layer_penalty(attention))


class _PenaltyAttention(AttentionBackend):
    """Attention of one layer. penalty: `[heads]`."""

    def __init__(self, rows: Sequence[_Blocks], penalty: Tensor) -> None:
        super().__init__(sum(len(block.bias) for block in rows[0][0]))
        self._rows, self._penalty = rows, penalty

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
        kv_heads = key.shape[1]
        sinks = None if sinks is None else group_heads(sinks, 0, kv_heads)
        attend = _AttendBlock(group_heads(self._penalty, 0, kv_heads), scale, softcap, sinks)
        rows = zip(self._rows, group_heads(query, 1, kv_heads), key, value, strict=True)
        return torch.stack([_attend_row(attend, blocks, *states) for blocks, *states in rows])


def _attend_row(attend: _AttendBlock, blocks: _Blocks, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`[tokens, heads, dim]` of `[kv heads, group, tokens, dim]`, and of `[kv heads, tokens, dim]`."""
    own, siblings = blocks
    queries = query.split([len(block.bias) for block in own], dim=2)
    keys, values = (ReadBlocks.apply(states, [*own, *siblings]) for states in (key, value))
    count = len(own)
    parts = map(attend, queries, own, siblings, keys[:count], values[:count], keys[count:], values[count:])
    return torch.cat([part.permute(2, 0, 1, 3) for part in parts]).flatten(1, 2)


class _AttendBlock:
    """Attention of one block of queries. penalty, sinks: `[kv heads, group]`."""

    def __init__(self, penalty: Tensor, scale: float, softcap: float | None, sinks: Tensor | None) -> None:
        self._penalty, self._scale, self._softcap, self._sinks = penalty, scale, softcap, sinks

    def __call__(
        self,
        query: Tensor,
        own: Block,
        siblings: Block,
        own_key: Tensor,
        own_value: Tensor,
        sibling_key: Tensor,
        sibling_value: Tensor,
    ) -> Tensor:
        """`[kv heads, group, queries, dim]`; keys and values: `[kv heads, keys, dim]`."""
        is_plain = self._softcap is None and self._sinks is None and query.shape[-1] == own_value.shape[-1]
        if is_plain and sibling_key.shape[1] == 0:
            return attend_sdpa(query, own_key, own_value, own, self._scale)
        states = (query, own_key, own_value, sibling_key, sibling_value)
        if is_plain:
            # Two results that are rounded to half precision would not add up to one that is.
            wide = (tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in states)
            merged: Tensor = _MergedAttention.apply(*wide, self._penalty, own, siblings, self._scale)
            return merged.to(query.dtype)
        sibling_bias = siblings.bias.float() - self._penalty[..., None, None]
        own_bias = own.bias.float().expand(*sibling_bias.shape[:2], -1, -1)
        return attend_biased(
            query,
            torch.cat([own_key, sibling_key], dim=1),
            torch.cat([own_value, sibling_value], dim=1),
            torch.cat([own_bias, sibling_bias], dim=-1),
            self._scale,
            self._softcap,
            self._sinks,
        )


class _MergedAttention(torch.autograd.Function):
    """Attention over own keys and over those of siblings, merged by their log-sum-exp.

    The kernel's backward pass takes the merged output and log-sum-exp in place of those of one part, and then
    returns that part's share of the gradients. The gradient of a penalty is minus the sum of those of the
    siblings' scores.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        sibling_key: Tensor,
        sibling_value: Tensor,
        penalty: Tensor,
        own: Block,
        siblings: Block,
        scale: float,
    ) -> Tensor:
        group = query.shape[1]
        rows, penalties = query.flatten(1, 2), penalty.detach().to(query.dtype)[..., None]
        own_out, own_sum = _attend_part(rows, own_key, own_value, own, group, scale)
        sibling_out, sibling_sum = _attend_part(rows, sibling_key, sibling_value, siblings, group, scale)
        lowered = (sibling_sum.unflatten(1, (group, -1)) - penalties).flatten(1)
        total = torch.logaddexp(own_sum, lowered)
        share = (lowered - total).exp()[..., None]
        out = own_out * (own_sum - total).exp()[..., None] + sibling_out * share
        ctx.save_for_backward(
            rows, own_key, own_value, sibling_key, sibling_value, penalties, out, total, sibling_out, share
        )
        ctx.blocks, ctx.scale, ctx.penalty_dtype = (own, siblings), scale, penalty.dtype
        return out.unflatten(1, (group, -1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, own_key, own_value, sibling_key, sibling_value, penalties, out, total, sibling_out, share = (
            ctx.saved_tensors
        )
        own, siblings = ctx.blocks
        group = gradient.shape[1]
        gradient = gradient.flatten(1, 2).contiguous()
        raised = (total.unflatten(1, (group, -1)) + penalties).flatten(1)
        query_part, *own_parts = _part_gradients(
            gradient, rows, own_key, own_value, out, total, own, group, ctx.scale
        )
        other_part, *sibling_parts = _part_gradients(
            gradient, rows, sibling_key, sibling_value, out, raised, siblings, group, ctx.scale
        )
        query_gradient = (query_part + other_part).unflatten(1, (group, -1))
        penalty_gradient = (share * gradient * (out - sibling_out)).unflatten(1, (group, -1)).sum((2, 3))
        return (
            query_gradient,
            *own_parts,
            *sibling_parts,
            penalty_gradient.to(ctx.penalty_dtype),
            None,
            None,
            None,
        )


def _attend_part(
    rows: Tensor, key: Tensor, value: Tensor, block: Block, group: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`[kv heads, rows, dim]` attention over one part of the keys, and `[kv heads, rows]` log-sum-exp."""
    bias = block.repeated_bias(group, rows.dtype)
    out, sums = _flash(rows[None], key[None], value[None], 0.0, False, attn_mask=bias, scale=scale)
    return out[0], sums[0]


def _part_gradients(
    gradient: Tensor,
    rows: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    block: Block,
    group: int,
    scale: float,
) -> list[Tensor]:
    """Gradients of queries, keys and values through one part of the keys."""
    states = (tensor[None] for tensor in (gradient, rows, key, value, out, sums))
    bias = block.repeated_bias(group, rows.dtype)
    parts = _flash_backward(*states, 0.0, False, attn_mask=bias, scale=scale)
    return [part[0] for part in parts]
