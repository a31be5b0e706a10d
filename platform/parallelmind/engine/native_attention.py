"""Attention of a step's tokens by the kernel in `native/attention.cpp`, straight from the paged KV cache."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallelmind.engine.batch import ModelInput
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.native import kernels
from parallelmind.visibility import AttentionWindow

_KERNELS = {torch.float32: "attend_float32", torch.bfloat16: "attend_bfloat16"}
_MAX_DIM = 1024  # as in attention.cpp
_NO_SCORES = np.empty(0, np.float32)
_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ARRAYS = (
    *("token_slot", "token_time", "token_segment", "query_start", "queries"),
    *("table_start", "tables", "num_keys", "blocks", "ends", "slot_time", "slot_segment"),
    *("score_start", "score_width", "scores", "span_adapter"),
)


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, _I) for name in ("tokens", "spans", "block", "width")),
        *((name, _P) for name in _ARRAYS),
        *((name, _I) for name in ("window", "chunk")),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _I) for name in ("heads", "kv_heads", "dim", "value_dim")),
        *(
            (f"{states}{what}", kind)
            for states in ("query", "key", "value")
            for what, kind in (("", _P), ("_token", _I), ("_head", _I))
        ),
        *((name, _P) for name in ("key_pool", "value_pool", "out")),
        *((name, _F) for name in ("scale", "softcap")),
        *((name, _P) for name in ("sinks", "penalties")),
    )


def is_supported(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel exists and takes these states."""
    fits = (
        query.device.type == "cpu" and query.dtype == value.dtype in _KERNELS and query.shape[3] <= _MAX_DIM
    )
    return fits and kernels() is not None


class NativeAttention:
    """Attention of a step's tokens over their spans; each key is read from the cache where it lies."""

    def __init__(self, inputs: ModelInput) -> None:
        spans, tables = inputs.spans, inputs.tables
        widths = np.array([len(table) for table in spans.scores] + [0], np.int32)  # that of no table last
        starts = np.cumsum([0, *(table.size for table in spans.scores)])
        self._arrays: list[NDArray[Any]] = [
            *(array.astype(np.int32) for array in (inputs.slots, inputs.time, inputs.segment)),
            *(spans.query_start, spans.queries, spans.table_start, spans.tables),
            inputs.num_keys.astype(np.int32),
            *(tables.blocks, tables.ends, tables.time, tables.segment),
            *(starts[spans.score], widths[spans.score]),
            np.concatenate([_NO_SCORES, *map(np.ravel, spans.scores)]),
            inputs.span_adapters.astype(np.int32),
        ]
        self._sizes = len(inputs.ids), len(spans), BLOCK, tables.blocks.shape[1]

    def step(self, window: AttentionWindow) -> ctypes.Structure:
        """The kernel's description of the step, for the layers of one attention window."""
        addresses = (array.ctypes.data for array in self._arrays)
        step = _Step(*self._sizes, *addresses, window.window or 0, window.chunk or 0)
        step.arrays = self._arrays  # that it points to
        return step


class NativeLayer:
    """The kernel for one layer of a model."""

    def __init__(
        self,
        query: Tensor,
        pools: tuple[Tensor, Tensor],
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> None:
        """query: `[1, heads, tokens, dim]`, of any step. pools: keys and values `[slots, heads, dim]`."""
        self.pools = pools
        self._sinks = None if sinks is None else sinks.float().contiguous()
        keys, values = pools
        self._call = call = _Layer(heads=query.shape[1], kv_heads=keys.shape[1], dim=keys.shape[2])
        call.value_dim, call.scale, call.softcap = values.shape[2], scale, softcap or 0.0
        call.key_pool, call.value_pool = keys.data_ptr(), values.data_ptr()
        call.sinks = None if self._sinks is None else self._sinks.data_ptr()
        self._pointer = ctypes.byref(call)
        self._kernel = getattr(kernels(), _KERNELS[query.dtype])

    def __call__(
        self,
        step: ctypes.Structure,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        penalties: Tensor | None = None,
    ) -> Tensor:
        """Write the step's keys and values to the pools; `[1, tokens, heads, dim]` attention.

        query, key, value: `[1, heads, tokens, dim]`. penalties: as in `SiblingPenalties.of`.
        """
        if query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
            query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        call = self._call
        out = value.new_empty((1, query.shape[2], call.heads, call.value_dim))
        _, call.query_head, call.query_token, _ = query.stride()
        _, call.key_head, call.key_token, _ = key.stride()
        _, call.value_head, call.value_token, _ = value.stride()
        call.query, call.key, call.value = query.data_ptr(), key.data_ptr(), value.data_ptr()
        call.out, call.penalties = out.data_ptr(), None if penalties is None else penalties.data_ptr()
        self._kernel(ctypes.byref(step), self._pointer)
        return out
