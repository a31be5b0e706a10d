"""Attention of a step's tokens over the paged KV cache.

For a model that hands masks to its attention unchanged, `CascadeAttention` stands in for a mask. Segments
of similar shape are gathered and attended to together. Each key is read once for all query heads that share
it. The results that a token has from several segments are merged by their log-sum-exp, as Hydragen and
FlashInfer's cascade do for shared prefixes. Any other model gets one dense mask over all keys of the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from parallelmind.engine.batch import AttentionSegment
from parallelmind.model.attention import length_bucket
from parallelmind.tree import Ints
from parallelmind.visibility import AttentionWindow


class CascadeAttention:
    """Attention of a step's tokens over their segments, for the layers of one attention window."""

    def __init__(
        self,
        segments: Sequence[AttentionSegment],
        num_tokens: int,
        window: AttentionWindow,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        similar = defaultdict(list)
        for segment in segments:
            shape = length_bucket(len(segment.query_indices)), length_bucket(len(segment.keys.slots))
            similar[segment.level, *shape].append(segment)
        self._num_tokens = num_tokens
        self._needs_merge = sum(len(segment.query_indices) for segment in segments) > num_tokens
        dtype = torch.float32 if self._needs_merge else dtype
        self._batches = [SegmentBatch.of(group, window, dtype, device) for group in similar.values()]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        penalties: Tensor | None = None,
    ) -> Tensor:
        """`[1, tokens, heads, dim]` of queries `[1, heads, tokens, dim]`.

        key, value: `[1, heads, slots, dim]`, all slots of the cache. softcap, sinks: as in
        `hf_compat.AttentionBackend.attend`. penalties: as in `SiblingPenalties.of`.
        """
        queries, keys, values = (
            states[0].transpose(0, 1) for states in (query, key, value)
        )  # [tokens or slots, heads, dim]
        shape = (self._num_tokens, queries.shape[1], values.shape[-1])
        if not self._needs_merge and softcap is None and sinks is None:
            out = values.new_empty(shape)
            for batch in self._batches:
                out[batch.targets] = batch.attend(queries, keys, values, scale, penalties)
            return out[None]
        # float32 until the end: to round after every segment would add up.
        out = values.new_zeros(shape, dtype=torch.float32)
        lse = out.new_full((*shape[:2], 1), -torch.inf)
        for batch in self._batches:
            attended = batch.attend_with_lse(queries, keys, values, scale, softcap, penalties)
            merge_lse(out, lse, batch.targets, *attended)
        if sinks is not None:  # the share of the keys beside the sink, whose value is zero
            out *= (lse - sinks.float()[:, None]).sigmoid()
        return out.to(values.dtype)[None]


@dataclass(slots=True)
class SegmentBatch:
    """Segments of similar shape, padded to the same shape.

    queries: `[segments, n]` indices into the step's tokens.
    keys: `[segments, keys]` cache slots, or a slice of the cache if there is one segment of adjacent slots.
    bias: `[segments, 1, n, keys]` summand of the scores, or None if it is zero.
    real: `[real]` flat indices of the queries that are not padding, or None if there is no padding.
    targets: `[real]` indices of these queries into the step's tokens.
    adapter: `[segments]` index of the version of each segment's adapter.
    """

    queries: Tensor
    keys: Tensor | slice
    bias: Tensor | None
    real: Tensor | None
    targets: Tensor
    adapter: Tensor
    _grouped_bias: dict[int, Tensor | None] = field(default_factory=dict)  # by query heads of one KV head

    @staticmethod
    def of(
        segments: Sequence[AttentionSegment],
        window: AttentionWindow,
        dtype: torch.dtype,
        device: torch.device,
    ) -> SegmentBatch:
        counts = [len(segment.query_indices) for segment in segments]
        num_queries, num_keys = max(counts), max(len(segment.keys.slots) for segment in segments)
        queries = np.zeros((len(segments), num_queries), np.int64)
        keys = np.zeros((len(segments), num_keys), np.int64)
        bias = np.full((len(segments), num_queries, num_keys), -np.inf, np.float32)
        for row, segment in enumerate(segments):
            count, length = counts[row], len(segment.keys.slots)
            queries[row, :count], queries[row, count:] = segment.query_indices, segment.query_indices[0]
            # Padding is a key of the segment itself: a NaN in another sample's key would reach this one.
            keys[row, :length], keys[row, length:] = segment.keys.slots, segment.keys.slots[0]
            bias[row, :count, :length] = segment.bias(window)
            bias[row, count:] = bias[row, 0]  # padding attends as the first query does, and is dropped
        is_real = np.arange(num_queries) < np.array(counts)[:, None]
        real = None if is_real.all() else np.flatnonzero(is_real)
        targets = queries.ravel() if real is None else queries.ravel()[real]
        return SegmentBatch(
            queries=torch.from_numpy(queries).to(device),
            keys=_adjacent_slots(keys) or torch.from_numpy(keys).to(device),
            bias=additive_mask(bias[:, None], dtype, device) if bias.any() else None,
            real=None if real is None else torch.from_numpy(real).to(device),
            targets=torch.from_numpy(targets).to(device),
            adapter=torch.tensor([segment.adapter for segment in segments], device=device),
        )

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float, penalties: Tensor | None = None
    ) -> Tensor:
        """`[real, heads, dim]` attention of queries that have no other segment."""
        query, key, value, bias = self._gather(queries, keys, values, penalties)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        return self._ungroup(out)

    def attend_with_lse(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        softcap: float | None = None,
        penalties: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Float32 `[real, heads, dim]` attention, and `[real, heads, 1]` log-sum-exp of its scores."""
        query, key, value, bias = self._gather(queries, keys, values, penalties)
        if query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and softcap is None:
            query, key, value = query.float(), key.float(), value.float()
            bias = None if bias is None else bias.float()
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, False, attn_mask=bias, scale=scale
            )
            return self._ungroup(out), self._ungroup(lse[..., None])
        scores = _matmul(query, key.transpose(-1, -2)) * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if bias is None else scores + bias
        lse = scores.logsumexp(dim=-1, keepdim=True)
        weights = (scores - lse).exp().to(value.dtype)
        return self._ungroup(_matmul(weights, value)), self._ungroup(lse)

    def _gather(
        self, queries: Tensor, keys: Tensor, values: Tensor, penalties: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key and value of all segments, and the bias.

        Shapes: `[segments, kv heads, group * n, dim]`, and twice `[segments, kv heads, keys, dim]`.
        `group` query heads share one KV head.
        """
        query = queries[self.queries]  # [segments, n, heads, dim]
        group = query.shape[2] // keys.shape[1]
        query = query.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        key, value = (
            (states[None, self.keys] if isinstance(self.keys, slice) else states[self.keys]).transpose(1, 2)
            for states in (keys, values)
        )
        return query, key, value, self._bias_of(group, penalties)

    def _bias_of(self, group: int, penalties: Tensor | None) -> Tensor | None:
        """`[segments, 1 or kv heads, group * n, keys]` summand of the scores; None if it is zero."""
        if self.bias is not None and penalties is not None:
            factors = penalties[self.adapter].to(self.bias.dtype)  # [segments, heads]
            factors = factors.unflatten(1, (-1, group))[..., None, None]
            bias, lowest = self.bias[:, :, None], torch.finfo(self.bias.dtype).min
            return torch.where(bias > lowest, bias * factors, lowest).flatten(2, 3)
        if group not in self._grouped_bias:
            self._grouped_bias[group] = None if self.bias is None else self.bias.repeat(1, 1, group, 1)
        return self._grouped_bias[group]

    def _ungroup(self, out: Tensor) -> Tensor:
        """`[segments, kv heads, group * n, dim]` to `[real, heads, dim]`."""
        n = self.queries.shape[1]
        rows = out.unflatten(2, (-1, n)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)
        return rows if self.real is None else rows[self.real]


def merge_lse(out: Tensor, lse: Tensor, targets: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """Merge the attention over one more segment into that of the targets' earlier segments, in place.

    out, lse: `[tokens, heads, dim]` and `[tokens, heads, 1]`. new_out, new_lse: the same of `targets` alone.
    """
    total = torch.logaddexp(lse[targets], new_lse)
    out[targets] = out[targets] * (lse[targets] - total).exp() + new_out * (new_lse - total).exp()
    lse[targets] = total


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """The float32 product. A GPU multiplies in the dtype of the inputs, for which it has faster units."""
    return left.float() @ right.float() if left.device.type == "cpu" else (left @ right).float()


def dense_masks(
    segments: Sequence[AttentionSegment], num_tokens: int, windows: Sequence[AttentionWindow]
) -> tuple[Ints, dict[AttentionWindow, NDArray[np.float32]]]:
    """One mask for all segments.

    Returns the `[keys]` slots that the step reads, and for each window the `[tokens, keys]` summand of the
    scores.
    """
    slots = np.unique(np.concatenate([segment.keys.slots for segment in segments]))
    masks = {window: np.full((num_tokens, len(slots)), -np.inf, np.float32) for window in windows}
    for segment in segments:
        where = np.ix_(segment.query_indices, np.searchsorted(slots, segment.keys.slots))
        for window, mask in masks.items():
            mask[where] = segment.bias(window)
    return slots, masks


def additive_mask(bias: NDArray[np.float32], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The bias as a tensor without infinities: a row that sees no key would become NaN."""
    return torch.from_numpy(bias).to(device).clamp(min=torch.finfo(dtype).min).to(dtype)


def _adjacent_slots(keys: Ints) -> slice | None:
    """The slots of a single segment as a slice if they are adjacent: reading a slice copies nothing."""
    if len(keys) > 1 or (np.diff(keys[0]) != 1).any():
        return None
    return slice(int(keys[0, 0]), int(keys[0, -1]) + 1)
