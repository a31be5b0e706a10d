"""The forward pass of a step, compiled once for any number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count
from types import FunctionType
from typing import Any

import torch
from transformers import PreTrainedModel

_numbers = count()


def compile_forward(model: PreTrainedModel, functions: dict[Any, list[str]]) -> Callable[..., Any]:
    """`model.forward`, compiled as one graph at its first call.

    functions: declarations of the C functions that compiled code calls in place of operators.

    At least two tokens and two sampled ones are in every call, in the first call different numbers of them:
    torch compiles sizes of 0 and 1, and sizes that are equal, separately. The engine changes nothing that
    guards would notice, so there are none.
    """

    def forward(**kwargs: Any) -> Any:
        return model(**kwargs)

    # torch finds compiled code by the code object. Without guards, one code object must mean one model.
    code = forward.__code__.replace(co_name=f"forward_{next(_numbers)}")
    own = FunctionType(code, forward.__globals__, code.co_name, closure=forward.__closure__)
    options: Any = {
        "guard_filter_fn": lambda guards: [False] * len(guards),
        "size_asserts": False,
        "cpp_wrapper": True,  # takes a millisecond less for each step than calling every kernel from Python
        "aot_inductor.custom_ops_to_c_shims": functions,
    }
    compiled: Callable[..., Any] = torch.compile(own, fullgraph=True, dynamic=True, options=options)
    return compiled


def compiling() -> AbstractContextManager[Any]:
    """Context of the first call. Numbers of the model's modules are constants and not inputs of the graph."""
    settings: AbstractContextManager[Any] = torch._dynamo.config.patch(specialize_float=True)
    return settings
