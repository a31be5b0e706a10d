"""Paged KV cache: for each layer one row of slots that all samples share.

transformers' dynamic layers copy the whole cache in every step, and its sliding layers drop tokens by storage
order, which is not the order of time here. These layers keep every token in the slot that the block manager
has assigned to it; attention windows are part of the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from parallelmind.tree import Ints

Change = Callable[[str, Tensor], Tensor]  # of `[slots, …]` states of a layer and kind, which it may change


class PagedKVLayer(CacheLayerMixin):
    """Keys and values of one layer, `[slots, heads, dim]` each; the model gets `[1, heads, slots, dim]`."""

    is_sliding = False

    def __init__(self, cache: PagedKVCache) -> None:
        super().__init__()
        self._cache = cache
        self._pools: dict[str, Tensor] = {}  # by the kind of state: keys, values, indexer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states of the step's tokens; returns keys and values of `kv_indices`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = self._write("keys", key_states[0].transpose(0, 1))
        values = self._write("values", value_states[0].transpose(0, 1))
        self.keys, self.values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        return self.keys, self.values

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """`update` for the `[1, tokens, dim]` keys of an attention that first selects its tokens."""
        return self._write("indexer", indexer_key_states[0])[None]

    def pools(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The `[slots, heads, dim]` pools for such keys and values, which have all slots of the step."""
        keys, values = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        return self._pool("keys", keys), self._pool("values", values)

    def _write(self, kind: str, states: Tensor) -> Tensor:
        """Write `[tokens, …]` to `slot_mapping`; returns what the step reads."""
        pool = self._pool(kind, states).index_copy_(0, self._cache.slot_mapping, states)
        return pool if self._cache.kv_indices is None else pool.index_select(0, self._cache.kv_indices)

    def _pool(self, kind: str, states: Tensor) -> Tensor:
        cache, pool = self._cache, self._pools.get(kind)
        if pool is None or len(pool) < cache.min_slots:
            pool = self._pools[kind] = _grow(pool, states, cache.min_slots, cache.max_slots)
        return pool

    def pool_for(self, kind: str, states: Tensor) -> Tensor:
        """The `[slots, …]` pool of a kind of state for `[tokens, …]` states."""
        return self._pool(kind, states)

    @property
    def pools_by_kind(self) -> Mapping[str, Tensor]:
        return self._pools

    def bytes_per_slot(self) -> int:
        return sum(pool[0].numel() * pool.element_size() for pool in self._pools.values())

    def num_slots(self) -> int:
        return max((len(pool) for pool in self._pools.values()), default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.past_length + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.past_length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._pools.clear()
        self.is_initialized = False


class PagedKVCache(Cache):
    """The layers of a model, and the slots that the running step writes and reads.

    slot_mapping: `[tokens]` slots that the step's tokens are written to.
    kv_indices: `[keys]` slots that the step reads; None where attention itself reads and writes the pools.
    min_slots: slots that the pools must have.
    max_slots: upper bound of the slots that the pools need, if it is known.
    past_length: keys that the step reads beyond its own tokens.
    updates: arguments of `update` that attention has not written yet, while they are recorded.
    """

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=cast(type[PagedKVLayer], partial(PagedKVLayer, self)))
        self.slot_mapping = torch.zeros(0, dtype=torch.long)
        self.kv_indices: Tensor | None = None
        self.min_slots = self.max_slots = self.past_length = 0
        self.updates: list[tuple[int, Tensor, Tensor]] | None = None
        self._pools: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in transformers. Where attention writes to the pools, the states are returned as they are."""
        if self.kv_indices is None:
            if self.updates is not None:
                self.updates.append((layer_idx, key_states, value_states))
            return key_states, value_states
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def pools(self, layer: int, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The `[slots, heads, dim]` pools of a layer for such states, which have all slots of the step."""
        pools = self._pools.get(layer)
        if pools is None or len(pools[0]) < self.min_slots:
            while len(self.layers) <= layer:
                self.layers.append(PagedKVLayer(self))
            pools = self._pools[layer] = self._paged_layers()[layer].pools(key_states, value_states)
        return pools

    def write(self, pools: tuple[Tensor, Tensor], key_states: Tensor, value_states: Tensor) -> None:
        """Write the `[1, heads, tokens, dim]` states of the step's tokens to the pools of a layer."""
        for pool, states in zip(pools, (key_states, value_states), strict=True):
            pool.index_copy_(0, self.slot_mapping, states[0].transpose(0, 1))

    @property
    def num_slots(self) -> int:
        """Slots that the pools of all layers have."""
        return min((len(keys) for keys, _ in self._pools.values()), default=0)

    @property
    def layer_pools(self) -> Mapping[int, tuple[Tensor, Tensor]]:
        """The pools that `pools` has returned, by layer."""
        return self._pools

    def reserve(self, num_slots: int) -> None:
        """Make the pools hold at least this many slots from the next step on."""
        self.min_slots = max(self.min_slots, num_slots)

    def set_step(self, slot_mapping: Tensor, kv_indices: Tensor | None) -> None:
        """Set the slots that the next step writes and reads."""
        self.slot_mapping, self.kv_indices = slot_mapping, kv_indices
        num_read = 0 if kv_indices is None else len(kv_indices)
        self.past_length = max(num_read - len(slot_mapping), 0)

    @torch.inference_mode()
    def read_slots(self, slots: Ints) -> dict[str, Tensor]:
        """Copies of what these slots hold, `[slots, …]` each, on the CPU, by layer and kind of state."""
        index = torch.from_numpy(slots)
        return {
            f"{number}.{kind}": pool.index_select(0, index.to(pool.device)).cpu()
            for number, layer in enumerate(self._paged_layers())
            for kind, pool in layer.pools_by_kind.items()
        }

    @torch.inference_mode()
    def copy_slots(self, sources: Ints, targets: Ints, change: Change, device: torch.device) -> None:
        """Copy what these slots hold to others, changed by `change`. device: of the model."""
        self.reserve(1 + int(targets.max()))
        source, target = torch.from_numpy(np.stack([sources, targets])).to(device)
        for number, layer in enumerate(self._paged_layers()):
            for kind, pool in [*layer.pools_by_kind.items()]:
                states = change(f"{number}.{kind}", pool.index_select(0, source))
                layer.pool_for(kind, states).index_copy_(0, target, states)

    @torch.inference_mode()
    def write_slots(self, slots: Ints, states: Mapping[str, Tensor], device: torch.device) -> None:
        """Write what `read_slots` has returned to these slots. device: of the model."""
        self.reserve(1 + int(slots.max()))
        index = torch.from_numpy(slots).to(device)
        for name, rows in states.items():
            layer, _, kind = name.partition(".")
            while len(self.layers) <= int(layer):
                self.layers.append(PagedKVLayer(self))
            on_device = rows.to(device)
            self._paged_layers()[int(layer)].pool_for(kind, on_device).index_copy_(0, index, on_device)

    def bytes_per_token(self) -> int:
        return sum(layer.bytes_per_slot() for layer in self._paged_layers())

    def bytes(self) -> int:
        """Memory of all pools, filled or not."""
        return sum(layer.bytes_per_slot() * layer.num_slots() for layer in self._paged_layers())

    def _paged_layers(self) -> list[PagedKVLayer]:
        return [layer for layer in self.layers if isinstance(layer, PagedKVLayer)]


def _grow(pool: Tensor | None, states: Tensor, num_slots: int, max_slots: int) -> Tensor:
    """A copy of the pool with room for `num_slots`, and for half as many again within `max_slots`.

    Without a pool, a new one with the shape and dtype of these states.
    """
    size = 0 if pool is None else len(pool)
    grown = states.new_zeros((max(num_slots, min(size + size // 2, max_slots)), *states.shape[1:]))
    if pool is not None:
        grown[:size] = pool
    return grown
