"""How the tokens of a step read the pool.

A model that hands masks to its attention as they are lets `CascadeAttention` do the work: stretches of like shape
are gathered and attended to together, every key is read once for all heads that share it, and what a token
finds in several stretches is joined by the weights of their softmax (as Hydragen and FlashInfer's cascade do
for shared prefixes). For any other model there is one dense mask over all keys of the step.
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
from parallelmind.layout import Ints
from parallelmind.model.attention import length_bucket
from parallelmind.model.hf_compat import AttentionBackend
from parallelmind.visibility import AttentionWindow


class CascadeAttention(AttentionBackend):
    """Attention of a step's tokens over their stretches, for layers of one reach."""

    def __init__(
        self,
        stretches: Sequence[AttentionSegment],
        tokens: int,
        reach: AttentionWindow,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(tokens)
        alike = defaultdict(list)
        for stretch in stretches:
            alike[
                stretch.own, length_bucket(len(stretch.queries)), length_bucket(len(stretch.keys.slots))
            ].append(stretch)
        self._bundles = [SegmentBatch.of(group, reach, dtype, device) for group in alike.values()]
        self._tokens = tokens
        self._joins = sum(len(stretch.queries) for stretch in stretches) > tokens

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        queries, keys, values = (
            part[0].transpose(0, 1) for part in (query, key, value)
        )  # [tokens or slots, heads, dim]
        shape = (self._tokens, queries.shape[1], values.shape[-1])
        if not self._joins:
            out = values.new_empty(shape)
            for bundle in self._bundles:
                out[bundle.targets] = bundle.attend(queries, keys, values, scale)
            return out[None]
        out, weight = (
            values.new_zeros(shape),
            queries.new_full((*shape[:2], 1), -torch.inf, dtype=torch.float32),
        )
        for bundle in self._bundles:
            part, part_weight = bundle.attend_weighed(queries, keys, values, scale)
            at = bundle.targets
            total = torch.logaddexp(weight[at], part_weight)
            out[at] = (out[at] * (weight[at] - total).exp() + part * (part_weight - total).exp()).to(
                out.dtype
            )
            weight[at] = total
        return out[None]


@dataclass(slots=True)
class SegmentBatch:
    """Stretches of like shape, padded to one.

    queries: `[stretches, n]` indices into the step. keys: `[stretches, keys]` slots, or a slice of the pool
    where they lie side by side. bias: what is added to scores, `[stretches, 1, n, keys]`, or None. real:
    `[found]` which of the `stretches * n` queries are no padding, or None; targets: `[found]` these queries'
    indices into the step.
    """

    queries: Tensor
    keys: Tensor | slice
    bias: Tensor | None
    real: Tensor | None
    targets: Tensor
    _folded: dict[int, Tensor | None] = field(default_factory=dict)

    @staticmethod
    def of(
        group: Sequence[AttentionSegment], reach: AttentionWindow, dtype: torch.dtype, device: torch.device
    ) -> SegmentBatch:
        counts = [len(stretch.queries) for stretch in group]
        most, longest = max(counts), max(len(stretch.keys.slots) for stretch in group)
        queries, keys = np.zeros((len(group), most), np.int64), np.zeros((len(group), longest), np.int64)
        bias = np.full((len(group), most, longest), -np.inf, np.float32)
        for row, stretch in enumerate(group):
            count, length = len(stretch.queries), len(stretch.keys.slots)
            queries[row, :count], queries[row, count:] = stretch.queries, stretch.queries[0]
            keys[row, :length] = stretch.keys.slots
            bias[row, :count, :length] = stretch.bias(reach)
            bias[row, count:] = bias[row, 0]  # padding reads what the first query reads, and is dropped
        real = None if min(counts) == most else np.flatnonzero(np.arange(most) < np.array(counts)[:, None])
        targets = queries.ravel() if real is None else queries.ravel()[real]
        return SegmentBatch(
            queries=torch.from_numpy(queries).to(device),
            keys=_side_by_side(keys) or torch.from_numpy(keys).to(device),
            bias=additive(bias[:, None], dtype, device) if bias.any() else None,
            real=None if real is None else torch.from_numpy(real).to(device),
            targets=torch.from_numpy(targets).to(device),
        )

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """`[found, heads, dim]`: all that these queries see is here."""
        query, key, value, bias = self._gathered(queries, keys, values)
        return self._found(F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale))

    def attend_weighed(
        self, queries: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`[found, heads, dim]`, and `[found, heads, 1]`: the logarithm of the sum of the scores'
        exponentials, in float32.
        """
        query, key, value, bias = self._gathered(queries, keys, values)
        if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
            out, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, False, attn_mask=bias, scale=scale
            )
            return self._found(out), self._found(weight[..., None])
        scores = (query @ key.transpose(-1, -2)).float() * scale
        scores = scores if bias is None else scores + bias
        weight = scores.logsumexp(dim=-1, keepdim=True)
        return self._found((scores - weight).exp().to(value.dtype) @ value), self._found(weight)

    def _gathered(
        self, queries: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """`[stretches, kv heads, group * n, dim]` and twice `[stretches, kv heads, keys, dim]`; the bias of
        so many heads.
        """
        query = queries[self.queries]  # [stretches, n, heads, dim]
        group = query.shape[2] // keys.shape[1]
        query = query.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        key, value = (
            (part[None, self.keys] if isinstance(self.keys, slice) else part[self.keys]).transpose(1, 2)
            for part in (keys, values)
        )
        if group not in self._folded:
            self._folded[group] = None if self.bias is None else self.bias.repeat(1, 1, group, 1)
        return query, key, value, self._folded[group]

    def _found(self, part: Tensor) -> Tensor:
        """From `[stretches, kv heads, group * n, dim]` to `[found, heads, dim]`."""
        n = self.queries.shape[1]
        rows = part.unflatten(2, (-1, n)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)
        return rows if self.real is None else rows[self.real]


def dense(
    stretches: Sequence[AttentionSegment], tokens: int, reaches: Sequence[AttentionWindow]
) -> tuple[Ints, dict[AttentionWindow, NDArray[np.float32]]]:
    """All slots that a step reads, `[keys]`, and for each reach what is added to every token's scores,
    `[tokens, keys]`.
    """
    slots = np.unique(np.concatenate([stretch.keys.slots for stretch in stretches]))
    masks = {reach: np.full((tokens, len(slots)), -np.inf, np.float32) for reach in reaches}
    for stretch in stretches:
        where = np.ix_(stretch.queries, np.searchsorted(slots, stretch.keys.slots))
        for reach, mask in masks.items():
            mask[where] = stretch.bias(reach)
    return slots, masks


def additive(bias: NDArray[np.float32], dtype: torch.dtype, device: torch.device) -> Tensor:
    """For an attention that takes no infinity: a row without any key would be nan."""
    return torch.from_numpy(bias).to(device).clamp(min=torch.finfo(dtype).min).to(dtype)


def _side_by_side(keys: Ints) -> slice | None:
    """The slots of a lone stretch as a slice, if they are one: reading them copies nothing."""
    if len(keys) > 1 or (np.diff(keys[0]) != 1).any():
        return None
    return slice(int(keys[0, 0]), int(keys[0, -1]) + 1)
