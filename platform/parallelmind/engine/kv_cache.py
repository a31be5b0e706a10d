"""The key-value pool of all samples: one row of slots for each layer, written and read by slot.

transformers' own dynamic layers copy the whole cache at every step, and its sliding layers drop by storage
order, which is not the order of time here. These layers keep everything where `blocks` says; windows belong
into the mask.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class PagedKVLayer(CacheLayerMixin):
    """Keys and values of one layer, `[slots, heads, dim]` each; a model sees them as `[1, heads, slots,
    dim]`.
    """

    is_sliding = False

    def __init__(self, pool: PagedKVCache) -> None:
        super().__init__()
        self._pool = pool
        self._parts: dict[str, Tensor] = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """What the layer has to read: the slots that the call asks for, or, for a mask that reads by itself,
        all.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = (
            self._enter(name, states[0].transpose(0, 1))
            for name, states in (("keys", key_states), ("values", value_states))
        )
        self.keys, self.values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        return self.keys, self.values

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Keys of an attention that chooses its tokens by a smaller attention first, `[1, tokens, dim]`."""
        return self._enter("indexer", indexer_key_states[0])[None]

    def _enter(self, name: str, states: Tensor) -> Tensor:
        """Write `[tokens, …]` to the call's slots; returns what is to be read."""
        part = self._parts.get(name)
        if part is None or len(part) < self._pool.slots_needed:
            part = self._parts[name] = _grown(part, states, self._pool.slots_needed, self._pool.most)
        part.index_copy_(0, self._pool.written, states)
        return part if self._pool.read is None else part.index_select(0, self._pool.read)

    def bytes_per_slot(self) -> int:
        return sum(part[0].numel() * part.element_size() for part in self._parts.values())

    def slots(self) -> int:
        return max((len(part) for part in self._parts.values()), default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._pool.past + query_length, 0

    def get_seq_length(self) -> int:
        return self._pool.past

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._parts.clear()
        self.is_initialized = False


class PagedKVCache(Cache):
    """The layers of a model, and which slots the running call writes and reads."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=cast(type[PagedKVLayer], partial(PagedKVLayer, self)))
        self.written = torch.zeros(0, dtype=torch.long)
        self.read: Tensor | None = None
        self.slots_needed = self.past = 0
        self.most = 0  # slots that will ever be needed, as far as that is known

    def reserve(self, slots: int) -> None:
        """The pool is going to need so many slots."""
        self.slots_needed = max(self.slots_needed, slots)

    def address(self, written: Tensor, read: Tensor | None) -> None:
        """Before a call. written: `[tokens]` slots of its tokens; read: `[keys]` slots to see, or all."""
        self.written, self.read = written, read
        self.past = max((0 if read is None else len(read)) - len(written), 0)

    def bytes_per_token(self) -> int:
        return sum(layer.bytes_per_slot() for layer in self.layers if isinstance(layer, PagedKVLayer))

    def bytes(self) -> int:
        """What the pool holds on to, filled or not."""
        return sum(
            layer.bytes_per_slot() * layer.slots() for layer in self.layers if isinstance(layer, PagedKVLayer)
        )


def _grown(part: Tensor | None, like: Tensor, slots: int, most: int) -> Tensor:
    """A pool of one kind with room for `slots`, what it held, and half as many again where so many can be
    needed.
    """
    known = 0 if part is None else len(part)
    grown = like.new_zeros((max(slots, min(known + known // 2, most)), *like.shape[1:]))
    if part is not None:
        grown[:known] = part
    return grown
