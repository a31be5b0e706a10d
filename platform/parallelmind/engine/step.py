"""A forward pass of the engine: what the operators of `model.step_ops` compute with."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from parallelmind.engine import native_attention
from parallelmind.engine.attention import CascadeAttention
from parallelmind.engine.batch import ModelInput
from parallelmind.engine.flex_attention import FlexAttention, without_nan
from parallelmind.engine.greedy_head import GreedyHead
from parallelmind.engine.kv_cache import PagedKVCache
from parallelmind.engine.native_attention import NativeAttention, NativeLayer
from parallelmind.engine.native_lora import LoraRows
from parallelmind.model.packed_linear import LinearGroup
from parallelmind.visibility import AttentionWindow


class IndirectCacheError(Exception):
    """A layer does not attend to exactly what it gives the cache, once."""


class Step:
    """One forward pass.

    windows: the attention windows of the layers; a layer's mask is the index of its window.
    cache: the KV cache of the step's tokens.
    """

    def __init__(
        self,
        inputs: ModelInput,
        cache: PagedKVCache,
        windows: Sequence[AttentionWindow],
        linears: Sequence[LinearGroup],
        kernels: dict[int, NativeLayer],
        lora: LoraRows | None = None,
        flex: FlexAttention | None = None,
        penalties: Mapping[int, Tensor] | None = None,
        head: GreedyHead | None = None,
    ) -> None:
        """kernels: by layer; kept from step to step. lora: adapters that the step computes by row.

        flex: computes the attention of the step, on an accelerator. penalties: as in `SiblingPenalties.of`.
        head: finds the most likely tokens, `largest`, and writes no logits.
        """
        self.attends, self._flex = cache.kv_indices is None, flex
        self._inputs, self.cache, self._windows, self._linears = inputs, cache, windows, linears
        self._kernels, self.lora, self.head, self.penalties = kernels, lora, head, penalties or {}
        self.largest = torch.empty(len(inputs.logits_indices), dtype=torch.int64)
        if lora is not None:
            lora.begin(inputs)
        self._native: NativeAttention | None = None
        self._native_steps: dict[AttentionWindow, ctypes.Structure] = {}
        self._cascades: dict[tuple[AttentionWindow, torch.dtype], CascadeAttention] = {}

    def linear(self, input: Tensor, group: int) -> Tensor:
        if self.head is not None and self.head.group == group:
            return self.head.find_largest(input, self.largest)
        product = self._linears[group](input)
        if self.lora is not None:
            self.lora.add(group, input, product)
        return product

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        layer: int,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        if self.cache.updates is not None:
            _check_direct(self.cache.updates, layer, key, value)
        window = self._windows[int(mask)]
        pools = self.cache.pools(layer, key, value)
        if self._flex is not None:
            self.cache.write(pools, *without_nan(key, value))
            return self._flex.attend(query, pools, window, scale, softcap, sinks)
        if native_attention.is_supported(query, value):
            kernel = self._kernels.get(layer)
            if kernel is None or kernel.pools is not pools:
                kernel = self._kernels[layer] = NativeLayer(query, pools, scale, softcap, sinks)
            return kernel(self._native_step(window), query, key, value, self.penalties.get(layer))
        self.cache.write(pools, key, value)
        keys, values = (pool.transpose(0, 1)[None] for pool in pools)
        cascade, penalties = self._cascade(window, query), self.penalties.get(layer)
        return cascade.attend(query, keys, values, scale, softcap, sinks, penalties)

    def native_steps(self) -> list[ctypes.Structure]:
        """The kernel's descriptions of the step, by the number of the window."""
        return [self._native_step(window) for window in self._windows]

    def _native_step(self, window: AttentionWindow) -> ctypes.Structure:
        if window not in self._native_steps:
            self._native = self._native or NativeAttention(self._inputs)
            self._native_steps[window] = self._native.step(window)
        return self._native_steps[window]

    def _cascade(self, window: AttentionWindow, query: Tensor) -> CascadeAttention:
        key = window, query.dtype
        if key not in self._cascades:
            self._cascades[key] = CascadeAttention(
                self._inputs.segments, len(self._inputs.ids), window, query.dtype, query.device
            )
        return self._cascades[key]


def _check_direct(updates: list[tuple[int, Tensor, Tensor]], layer: int, key: Tensor, value: Tensor) -> None:
    """Raise IndirectCacheError unless the last update of the cache was for these states of this layer."""
    updated, keys, values = updates.pop() if updates else (-1, key, value)
    same = all(
        left.data_ptr() == right.data_ptr() and left.shape == right.shape
        for left, right in ((keys, key), (values, value))
    )
    if updated != layer or not same:
        raise IndirectCacheError
