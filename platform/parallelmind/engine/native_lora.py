"""Low-rank adapters by row: samples with different adapters share a forward pass.

The base model's product is computed for all rows at once; the kernel in `native/lora.cpp` then adds to each
row what the adapter of its sample adds. peft computes the same with one adapter for all rows.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from parallelmind.engine.batch import ModelInput
from parallelmind.engine.native import kernels
from parallelmind.engine.native_linear import NativeProduct, multiplied_dtype
from parallelmind.model import step_ops
from parallelmind.model.packed_linear import LinearGroup, set_class
from parallelmind.model.penalty import adapted_layers

_KERNELS = {torch.float32: "add_low_rank_float32", torch.bfloat16: "add_low_rank_bfloat16"}
_P, _I = ctypes.c_void_p, ctypes.c_int64


class _LowRank(ctypes.Structure):
    _fields_ = (
        ("up", _P),
        *((name, _I) for name in ("first", "first_rank")),
        ("scale", ctypes.c_float),
    )


class _BaseLinear(LoraLinear):
    """An adapted layer in a step of the engine: computes its base layer, to which the step adds adapters."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if step_ops.is_running():
            base: Tensor = self.base_layer(x)
            return base
        result: Tensor = super().forward(x, *args, **kwargs)
        return result


class LoraRows:
    """The adapters of a model whose every adapted layer belongs to a group of linear layers.

    `is_possible` says for which models this holds. An adapter that is added or removed needs a new object.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[LinearGroup], head: nn.Module | None = None
    ) -> None:
        """head: the layer that reads the sampled tokens alone, with or without its adapters."""
        self._layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
        owners = {id(layer.base_layer): layer for layer in self._layers}
        self._owners = [[owners.get(id(layer)) for layer in group.layers] for group in groups]
        self._sizes = [group.sizes for group in groups]
        head = getattr(head, "base_layer", head)
        self._reads_sampled = [head in group.layers for group in groups]
        self._columns = [
            sum(sizes) if any(owners) else 0 for owners, sizes in zip(self._owners, self._sizes, strict=True)
        ]
        self._kernels = {dtype: _kernel(name) for dtype, name in _KERNELS.items()}
        self._adapters: dict[str, _Adapter] = {}  # by version
        self._table = np.empty((len(groups), 0, 3), np.int64)
        self._pointers = np.zeros((len(groups), 3), np.int64)  # `Adapters` of each group in operators.cpp
        self._rows = self._sampled_rows = np.empty(0, np.int32)

    def begin(self, inputs: ModelInput) -> None:
        """Set the adapters that `add` adds, for a step with these tokens."""
        self._rows = np.ascontiguousarray(inputs.adapter, np.int32)
        self._sampled_rows = self._rows[inputs.logits_indices]
        self._table = np.stack([self._adapter(version).groups for version in inputs.adapters], axis=1)
        addresses = self._table.ctypes.data + self._table.strides[0] * np.arange(len(self._table))
        self._pointers = np.stack([self._columns, addresses, self._reads_sampled], axis=1)

    def _adapter(self, version: str) -> _Adapter:
        if version not in self._adapters:
            self._adapters[version] = _Adapter(version, self._owners, self._sizes)
        return self._adapters[version]

    def adapts(self, group: int) -> bool:
        """Whether an adapter of the model has any of the group's layers."""
        return bool(self._columns[group])

    def add(self, group: int, input: Tensor, product: Tensor) -> None:
        """Add the adapters of the step's samples to `product`, the group's product with `input`, in place."""
        columns, adapters, reads_sampled = self._pointers[group].tolist()
        if columns:
            input = input.contiguous()
            rows = self._sampled_rows if reads_sampled else self._rows
            self._kernels[input.dtype](
                input.data_ptr(),
                product.data_ptr(),
                len(rows),
                input.shape[-1],
                columns,
                adapters,
                rows.ctypes.data,
            )

    def pointers(self) -> tuple[int, int, int]:
        """The adapters of each group, and the adapter of each token and of each sampled one."""
        return self._pointers.ctypes.data, self._rows.ctypes.data, self._sampled_rows.ctypes.data

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which adapted layers leave their adapters to the step.

        Relies on: assigning `__class__` of peft's layers.
        """
        for layer in self._layers:
            set_class(layer, _BaseLinear)
        try:
            yield
        finally:
            for layer in self._layers:
                set_class(layer, LoraLinear)


def is_possible(model: nn.Module, groups: Sequence[LinearGroup]) -> bool:
    """Whether all that peft has added to a model is plain LoRA on layers of groups that read every token."""
    if kernels() is None:
        return False
    grouped = {id(layer) for group in groups if group.reads_tokens for layer in group.layers}
    return all(_is_plain(module) and id(module.base_layer) in grouped for module in adapted_layers(model))


def _is_plain(layer: nn.Module) -> bool:
    return (
        type(layer) in (LoraLinear, _BaseLinear)
        and isinstance(layer, LoraLayer)
        and not (layer.lora_variant or layer.merged or layer.fan_in_fan_out or any(layer.lora_bias.values()))
        and layer.base_layer.weight.dtype in _KERNELS
        and layer.base_layer.weight.device.type == "cpu"
    )


class _Adapter:
    """One version of an adapter on all groups, its weights packed in the dtype that the kernel multiplies.

    groups: `[groups, 3]` the group's adapted layers, their number, and the product of their first matrices.
    """

    def __init__(
        self, version: str, owners: Sequence[Sequence[LoraLinear | None]], sizes: Sequence[Sequence[int]]
    ) -> None:
        """owners, sizes: adapted layer and number of outputs of every layer of each group."""
        self._packed: list[NativeProduct] = []
        self._entries: list[ctypes.Array[_LowRank]] = []
        self.groups = np.array([self._group(version, *group) for group in zip(owners, sizes, strict=True)])

    def _group(
        self, version: str, owners: Sequence[LoraLinear | None], sizes: Sequence[int]
    ) -> tuple[int, int, int]:
        firsts = np.cumsum([0, *sizes]).tolist()
        adapted = [
            (owner, first)
            for owner, first in zip(owners, firsts, strict=False)
            if owner is not None and version in owner.lora_A
        ]
        entries = (_LowRank * len(adapted))()
        self._entries.append(entries)
        if not adapted:
            return 0, 0, 0
        downs = [_weight(owner.lora_A[version]) for owner, _ in adapted]
        dtype = multiplied_dtype(_weight(adapted[0][0].base_layer).dtype)
        first_rank = 0
        for index, (owner, first) in enumerate(adapted):
            up = self._pack(_weight(owner.lora_B[version]), dtype)
            entries[index] = _LowRank(up, first, first_rank, owner.scaling[version])
            first_rank += len(downs[index])
        return ctypes.addressof(entries), len(entries), self._pack(torch.cat(downs), dtype)

    def _pack(self, weight: Tensor, dtype: torch.dtype) -> int:
        """The address of packed weights, which stay as long as the adapter."""
        self._packed.append(NativeProduct(weight.to(dtype), None))
        return ctypes.addressof(self._packed[-1].weights)


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach()
    return weight


def _kernel(name: str) -> Any:
    function = getattr(kernels(), name)
    function.argtypes = (_P, _P, _I, _I, _I, _P, _P)
    return function
