"""Products with packed weights by the kernel in `native/linear.cpp`.

A step of few tokens takes as long as reading the weights, which the kernel does in one stream. The result of
a row does not depend on the other rows of a product.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from parallelmind.engine.native import kernels
from parallelmind.model.packed_linear import OneDnnProduct, Pack, Product

_OUTPUTS = 32  # of a block of packed weights
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_P, _I = ctypes.c_void_p, ctypes.c_int64


class _Weights(ctypes.Structure):
    _fields_ = (*((name, _P) for name in ("packed", "bias")), *((name, _I) for name in ("inputs", "outputs")))


class NativeProduct:
    """Product with weights in float32, or in bfloat16 that the processor multiplies."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: `[outputs, inputs]`. bias: `[outputs]`."""
        outputs, inputs = weight.shape
        blocks = -(-outputs // _OUTPUTS)
        words = -(-inputs * weight.element_size() // 4)
        self._packed = torch.empty(blocks, words, _OUTPUTS)
        _function("pack", weight.dtype, _P, _P, _I, _I)(
            weight.contiguous().data_ptr(), self._packed.data_ptr(), inputs, outputs
        )
        self._bias = torch.zeros(0 if bias is None else blocks * _OUTPUTS)
        if bias is not None:
            self._bias[:outputs] = bias
        pointers = (None if bias is None else self._bias.data_ptr()), inputs, outputs
        self.weights = _Weights(self._packed.data_ptr(), *pointers)
        self._multiply, self._find_largest = (
            _function(name, weight.dtype, _P, _P, _P, _I) for name in ("multiply", "find_largest")
        )

    def __call__(self, input: Tensor) -> Tensor:
        """`[..., outputs]` of `[..., inputs]`, in the dtype of the weights."""
        input = input.contiguous()
        out = input.new_empty((*input.shape[:-1], self.weights.outputs))
        rows = input.numel() // self.weights.inputs
        self._multiply(input.data_ptr(), ctypes.addressof(self.weights), out.data_ptr(), rows)
        return out

    def find_largest(self, input: Tensor, outputs: Tensor) -> None:
        """Write the first largest output of each row to `outputs`; -1 if it is infinite or if any is NaN.

        input: `[..., inputs]`. outputs: `[rows]` int64. The product itself is not written to memory.
        """
        input = input.contiguous()
        pointers = input.data_ptr(), ctypes.addressof(self.weights), outputs.data_ptr()
        self._find_largest(*pointers, len(outputs))


def pack(weight: Tensor, bias: Tensor | None) -> Product:
    """The fastest product with these weights, which are in a dtype that the processor multiplies."""
    fastest: Pack = NativeProduct if _is_fastest(weight.dtype) else OneDnnProduct
    return fastest(weight, bias)


def multiplied_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the packed weights that the kernels multiply with numbers of this dtype."""
    return dtype if hasattr(kernels(), f"pack_{_NAMES[dtype]}") else torch.float32


def _is_fastest(dtype: torch.dtype) -> bool:
    """Whether the kernel has this dtype, and the processor has no units for matrices, which oneDNN uses."""
    has = torch.cpu.get_capabilities()
    is_vector = dtype == torch.float32 or (has.get("avx512_bf16", False) and not has.get("amx_bf16", False))
    return dtype in _NAMES and is_vector and kernels() is not None


def _function(name: str, dtype: torch.dtype, *arguments: Any) -> Any:
    function = getattr(kernels(), f"{name}_{_NAMES[dtype]}")
    function.argtypes = arguments
    return function
