"""The operators of `model.step_ops` for compiled code, which calls them in C++ (`native/operators.cpp`)."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from parallelmind.engine.kv_cache import PagedKVCache
from parallelmind.engine.native import kernels
from parallelmind.engine.native_linear import NativeProduct
from parallelmind.engine.step import Step
from parallelmind.model import step_ops
from parallelmind.model.packed_linear import OneDnnProduct, PackedLinears, Product, product_dtype

_P, _I = ctypes.c_void_p, ctypes.c_int64
_LINEAR = "int32_t aoti_torch_cpu_step_linear(AtenTensorHandle, int64_t, int64_t, AtenTensorHandle*)"
_ATTEND = (
    "int32_t aoti_torch_cpu_step_attend(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, "
    "AtenTensorHandle, int64_t, double, const double*, const AtenTensorHandle*, AtenTensorHandle*)"
)


class _Linear(ctypes.Structure):
    _fields_ = (("weight", _P), ("bias", _P), ("own", _P))


class _Pool(ctypes.Structure):
    _fields_ = (("keys", _P), ("values", _P))


class _Pass(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("linears", "adapters", "pools", "windows", "adapter", "sampled_adapter")),
        ("penalties", _P),
        ("head", _I),
        ("largest", _P),
    )


class Declarations(dict[Any, list[str]]):
    """Declarations of the C functions by operator, of which pickle keeps the names.

    torch keeps compiled code by its pickled settings, and operators cannot be pickled.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return Declarations, (), {str(operator): functions for operator, functions in self.items()}


def declarations(dtype: torch.dtype) -> Declarations:
    """The C functions of the operators, for a model of this dtype.

    An operator without a function is called in Python: products of half precision on a processor that does
    not multiply it, and attention in float16.
    """
    functions = Declarations()
    if dtype in (torch.float32, torch.bfloat16) and product_dtype(dtype) == dtype:
        functions[step_ops.linear.default] = [_LINEAR]
    if dtype in (torch.float32, torch.bfloat16):
        functions[step_ops.attend.default] = [_ATTEND]
    return functions


class NativeOperators:
    """What the operators compute with, from pass to pass."""

    def __init__(self, linears: PackedLinears, pools: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        """pools: of the layers, in any cache of the model."""
        library = kernels()
        assert library is not None, "compiled code needs the kernels"
        self._run = library.set_pass
        self._like = pools
        products = [group.product for group in linears.groups]
        packed = [product for product in products if isinstance(product, OneDnnProduct)]
        self._handles = _Handles([tensor for product in packed for tensor in (product.weight, product.bias)])
        pointers = iter(self._handles.pointers)
        self._linears = (_Linear * len(products))(*(_linear(product, pointers) for product in products))
        self._pools = (_Pool * (max(pools, default=-1) + 1))()
        self._cache: PagedKVCache | None = None  # that the pools are of
        self._num_slots = 0

    @contextmanager
    def running(self, step: Step, cache: PagedKVCache) -> Iterator[None]:
        """Context in which compiled code of this thread computes with `step`."""
        if self._cache is not cache or self._num_slots < cache.min_slots:
            self._set_pools(cache)
        steps = step.native_steps()
        windows = (_P * len(steps))(*(ctypes.addressof(each) for each in steps))
        current = _Pass(ctypes.addressof(self._linears), None, ctypes.addressof(self._pools))
        current.windows = ctypes.addressof(windows)
        if step.lora is not None:
            current.adapters, current.adapter, current.sampled_adapter = step.lora.pointers()
        penalties = _addresses(step.penalties)
        current.penalties = ctypes.addressof(penalties) if penalties else None
        if step.head is not None:
            current.head, current.largest = step.head.group, step.largest.data_ptr()
        self._run(ctypes.byref(current))
        try:
            yield
        finally:
            self._run(None)

    def _set_pools(self, cache: PagedKVCache) -> None:
        for layer, (keys, values) in self._like.items():
            states = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
            pools = cache.pools(layer, *states)
            self._pools[layer] = _Pool(*(pool.data_ptr() for pool in pools))
        self._cache, self._num_slots = cache, cache.num_slots


def _addresses(tensors: Mapping[int, Tensor]) -> Any:
    """Addresses of tensors by layer."""
    addresses = (_P * (max(tensors, default=-1) + 1))()
    for layer, tensor in tensors.items():
        addresses[layer] = tensor.data_ptr()
    return addresses


def _linear(product: Product, handles: Iterator[int | None]) -> _Linear:
    if isinstance(product, NativeProduct):
        return _Linear(None, None, ctypes.addressof(product.weights))
    return _Linear(next(handles), next(handles), None)


class _Handles:
    """Handles of tensors for C++, deleted with this object."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([t for t in tensors if t is not None])
        pointers = iter([_pointer(capsule) for capsule in capsules])
        self.pointers = [None if tensor is None else next(pointers) for tensor in tensors]
        weakref.finalize(self, _delete, self.pointers)


def _pointer(capsule: Any) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = _P, (ctypes.py_object, ctypes.c_char_p)
    pointer: int = get(capsule, None)
    return pointer


def _delete(pointers: Sequence[int | None]) -> None:
    library = kernels()
    assert library is not None, "the handles are for the kernels"
    for pointer in pointers:
        if pointer is not None:
            library.aoti_torch_delete_tensor_object(_P(pointer))
