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
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from parallelmind.engine.batch import ModelInput
from parallelmind.engine.native import kernels
from parallelmind.model import step_ops
from parallelmind.model.packed_linear import LinearGroup, set_class

_KERNELS = {torch.float32: "add_low_rank_float32", torch.bfloat16: "add_low_rank_bfloat16"}
_MAX_COMBINATIONS = 64  # of adapters in one step, whose tables are kept
_P, _I = ctypes.c_void_p, ctypes.c_int64


class _LowRank(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("down", "up")),
        *((name, _I) for name in ("rank", "first", "outputs")),
        ("scale", ctypes.c_float),
    )


class _Adapters(ctypes.Structure):
    _fields_ = (("columns", _I), ("start", _P), ("entries", _P))


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

    `is_possible` says for which models this holds.
    """

    def __init__(self, model: nn.Module, groups: Sequence[LinearGroup]) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
        owners = {id(layer.base_layer): layer for layer in self._layers}
        self._owners = [[owners.get(id(layer)) for layer in group.layers] for group in groups]
        self._groups = groups
        self._tables: dict[tuple[str, ...], _Tables] = {}  # by adapters
        self._current = _Tables([], [], ())
        self._rows = self._sampled_rows = np.empty(0, np.int32)

    def begin(self, inputs: ModelInput) -> None:
        """Set the adapters that `add` adds, for a step with these tokens."""
        self._rows = np.ascontiguousarray(inputs.adapter, np.int32)
        self._sampled_rows = self._rows[inputs.logits_indices]
        tables = self._tables.get(inputs.adapters)
        if tables is None:
            if len(self._tables) > _MAX_COMBINATIONS:
                self._tables.clear()
            tables = self._tables[inputs.adapters] = _Tables(self._owners, self._groups, inputs.adapters)
        self._current = tables

    def add(self, group: int, input: Tensor, product: Tensor) -> None:
        """Add the adapters of the step's samples to `product`, the group's product with `input`, in place."""
        table = self._current.groups[group]
        if table is not None:
            # The head reads the sampled tokens alone.
            table.add(
                input, product, self._rows if input.shape[-2] == len(self._rows) else self._sampled_rows
            )

    def pointers(self) -> tuple[int, int, int, int]:
        """The adapters of each group, the number of tokens, and the adapter of each and of sampled ones."""
        rows = self._rows.ctypes.data, self._sampled_rows.ctypes.data
        return ctypes.addressof(self._current.entries), len(self._rows), *rows

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
    wrapped = [
        module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    return all(_is_plain(module) and id(module.base_layer) in grouped for module in wrapped)


def _is_plain(layer: nn.Module) -> bool:
    return (
        type(layer) in (LoraLinear, _BaseLinear)
        and isinstance(layer, LoraLayer)
        and not (layer.lora_variant or layer.merged or layer.fan_in_fan_out or any(layer.lora_bias.values()))
        and layer.base_layer.weight.dtype in _KERNELS
        and layer.base_layer.weight.device.type == "cpu"
    )


class _Tables:
    """The adapters of all groups of layers, for the samples of a step."""

    def __init__(
        self,
        owners: Sequence[Sequence[LoraLinear | None]],
        groups: Sequence[LinearGroup],
        adapters: Sequence[str],
    ) -> None:
        self.groups = [
            _Table(each, group.sizes, adapters) if any(each) else None
            for each, group in zip(owners, groups, strict=True)
        ]
        entries = (_Adapters() if table is None else table.entry for table in self.groups)
        self.entries = (_Adapters * len(groups))(*entries)


class _Table:
    """The adapters of one group of layers, for the samples of a step."""

    def __init__(
        self, owners: Sequence[LoraLinear | None], sizes: Sequence[int], adapters: Sequence[str]
    ) -> None:
        self._kept: list[Tensor] = []
        entries: list[_LowRank] = []
        starts = [0]
        firsts = np.cumsum([0, *sizes]).tolist()
        for adapter in adapters:
            for owner, first, outputs in zip(owners, firsts, sizes, strict=False):
                if owner is not None and adapter in owner.lora_A:
                    entries.append(self._entry(owner, adapter, first, outputs))
            starts.append(len(entries))
        self._starts = np.array(starts, np.int32)
        self._entries = (_LowRank * max(len(entries), 1))(*entries)
        self._columns = firsts[-1]
        self.entry = _Adapters(self._columns, self._starts.ctypes.data, ctypes.addressof(self._entries))
        self._kernels = {dtype: _kernel(name) for dtype, name in _KERNELS.items()}

    def _entry(self, owner: LoraLinear, adapter: str, first: int, outputs: int) -> _LowRank:
        layers: list[Any] = [owner.lora_A[adapter], owner.lora_B[adapter]]
        weights: list[Tensor] = [layer.weight for layer in layers]
        down, up = (weight.detach().float() for weight in weights)
        down, up = down.contiguous(), up.t().contiguous()
        self._kept += [down, up]
        return _LowRank(down.data_ptr(), up.data_ptr(), len(down), first, outputs, owner.scaling[adapter])

    def add(self, input: Tensor, product: Tensor, adapter: NDArray[np.int32]) -> None:
        """adapter: `[rows]` index of each row's adapter."""
        input = input.contiguous()
        self._kernels[input.dtype](
            input.data_ptr(),
            product.data_ptr(),
            len(adapter),
            input.shape[-1],
            self._columns,
            self._starts.ctypes.data,
            self._entries,
            adapter.ctypes.data,
        )


def _kernel(name: str) -> Any:
    function = getattr(kernels(), name)
    function.argtypes = (_P, _P, _I, _I, _I, _P, _P, _P)
    return function
