"""The most likely token of each row of logits by the kernel in `native/largest.cpp`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from parallelmind.engine.native import kernels

_KERNELS = {torch.float32: "largest_32", torch.bfloat16: "largest_16", torch.float16: "largest_16"}
_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # its bits
_P, _I = ctypes.c_void_p, ctypes.c_int64

NOT_FINITE, NOT_POSITIVE = -1, -2  # what the kernel returns in place of a token


def is_supported(logits: Tensor) -> bool:
    """Whether the kernel exists and takes these logits."""
    fits = logits.device.type == "cpu" and logits.dtype in _KERNELS and logits.stride(-1) == 1
    return fits and kernels() is not None


def first_largest(logits: Tensor) -> Tensor:
    """`[rows]` index of the first largest of `[rows, vocab]` numbers.

    NOT_FINITE for a row with a NaN, or whose largest number is infinite; NOT_POSITIVE for one that has no
    positive number, which the kernel does not compare.
    """
    tokens = torch.empty(len(logits), dtype=torch.int64)
    kernel = getattr(kernels(), _KERNELS[logits.dtype])
    kernel.argtypes = (_P, _I, _I, _I, _I, _P)
    kernel(logits.data_ptr(), *logits.shape, logits.stride(0), _INFINITY[logits.dtype], tokens.data_ptr())
    return tokens
