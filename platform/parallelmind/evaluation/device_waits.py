"""Count where the host waits for an accelerator. The meta device stands in for it.

The meta device computes shapes alone, and raises for operators that mix it with the host or whose result has
a shape that depends on data. What is read from it is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("tolist", "item", "numpy", "cpu", "nonzero", "__int__", "__float__", "__bool__", "__index__")


@contextmanager
def count_reads() -> Iterator[list[str]]:
    """Context that lists, by name, every read of a meta tensor."""
    reads: list[str] = []
    with ExitStack() as stack:
        for name in _READS:
            stack.enter_context(patch.object(Tensor, name, _counted(getattr(Tensor, name), name, reads)))
        yield reads


@contextmanager
def count_waits() -> Iterator[list[str]]:
    """Context that lists, by name, every read of a meta tensor and every blocking copy to one."""
    adam = import_module("torch.optim.adam")  # no attribute of torch.optim
    with ExitStack() as stack:
        waits = stack.enter_context(count_reads())
        # The meta device has no autocast, and no fused optimizer, which reads nothing on other devices.
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda device_type: False))
        stack.enter_context(patch.object(adam, "_device_dtype_check_for_fused", lambda *_, **__: None))
        stack.enter_context(patch.object(torch, "_fused_adamw_", lambda *_, **__: None))
        stack.enter_context(_BlockingCopies(waits))
        yield waits


def _counted(original: Callable[..., Any], name: str, waits: list[str]) -> Callable[..., Any]:
    def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.device.type == "meta":
            waits.append(name)
            tensor = torch.zeros(tensor.shape, dtype=tensor.dtype)
        return original(tensor, *args, **kwargs)

    return read


class _BlockingCopies(TorchDispatchMode):
    """Adds `copy` to the waits for every copy from the host to the meta device that waits for its end."""

    supports_higher_order_operators = True

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if blocking and source.device.type == "cpu" and result.device.type == "meta":
                self._waits.append("copy")
        return result
