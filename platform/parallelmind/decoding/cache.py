"""The key-value cache of one sample: buffers that grow by doubling and are written in place.

transformers' own dynamic layers copy the whole cache at every step, and its sliding layers drop by storage order, which
is not the order of time here. These layers keep everything; windows belong into the mask.

Branches that see neither siblings nor a main can part after the prompt, one cache row for each: then a step's attention
reads every key once, instead of once for each branch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from parallelmind.layout import PADDING

_FIRST_CAPACITY = 64


class GrowingLayer(CacheLayerMixin):
    """Keys and values of one layer, `[batch, heads, filled, dim]` views into buffers with room for more."""

    is_sliding = False
    indexer_keys: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.length = 0
        self._keys, self._values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self._keys.shape[-2]:
            self._keys, self._values = (_grown(part, self.length, dim=-2) for part in (self._keys, self._values))
        self._keys[..., start : self.length, :] = key_states
        self._values[..., start : self.length, :] = value_states
        self.keys, self.values = self._keys[..., : self.length, :], self._values[..., : self.length, :]
        return self.keys, self.values

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Keys of an attention that chooses its tokens by a smaller attention first, `[batch, tokens, dim]`."""
        known = [] if self.indexer_keys is None else [self.indexer_keys]
        self.indexer_keys = torch.cat([*known, indexer_key_states], dim=1)
        return self.indexer_keys

    def gather(self, index: Tensor) -> None:
        """From one row to `[rows, …]`. index: `[rows, longest]` places in the one row."""
        rows, longest = index.shape
        for name in ("_keys", "_values"):
            parted = getattr(self, name)[0].index_select(1, index.flatten()).unflatten(1, (rows, longest))
            setattr(self, name, parted.transpose(0, 1).contiguous())  # [rows, heads, longest, dim]
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[0][index]
        self.length = longest

    def select(self, rows: Tensor) -> None:
        self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys.index_select(0, rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = self.indexer_keys = None
        self.is_initialized = False


class BranchCache(Cache):
    """A full-length cache that also knows the time and the sequence of every token in it, for the mask."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=GrowingLayer)
        self._where = torch.empty(2, 1, 0, dtype=torch.long)
        self._length = 0

    def note(self, time: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """Enter the tokens that the next forward pass will add; returns time and sequence of all, `[batch, keys]` each.

        time, sequence: `[batch, tokens]` integers; sequence is -1 for padding.
        """
        start, self._length = self._length, self._length + time.shape[-1]
        if self._length > self._where.shape[-1]:
            empty = self._where.to(time.device).expand(2, time.shape[0], -1)
            self._where = _grown(empty, self._length, dim=-1, fill=PADDING)
        self._where[0, :, start : self._length] = time
        self._where[1, :, start : self._length] = sequence
        filled = self._where[..., : self._length]
        return filled[0], filled[1]

    def part(self, index: Tensor) -> None:
        """Give every branch a row of its own. index: `[rows, longest]` places in the one row so far, -1 for padding."""
        filled = torch.where(index >= 0, self._where[:, 0, index.clamp(min=0)], PADDING)
        self._where, self._length = filled, index.shape[1]
        for layer in self._growing():
            layer.gather(index.clamp(min=0))

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self._where = self._where.index_select(1, rows)
        for layer in self._growing():
            layer.select(rows)

    def _growing(self) -> list[GrowingLayer]:
        return cast(list[GrowingLayer], self.layers)


def _grown(buffer: Tensor, needed: int, dim: int, fill: int = 0) -> Tensor:
    """A copy of `buffer` with room for `needed` entries along `dim` and as many again."""
    shape = list(buffer.shape)
    shape[dim] = max(2 * needed, _FIRST_CAPACITY)
    grown = buffer.new_full(shape, fill)
    grown.narrow(dim, 0, buffer.shape[dim]).copy_(buffer)
    return grown
