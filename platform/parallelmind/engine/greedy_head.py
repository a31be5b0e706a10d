"""The most likely tokens straight from the product of the model's head, which then writes no logits.

Logits of many rows are the largest tensor of a step, and greedy sampling needs one number of each row. The
kernel in `native/linear.cpp` keeps it while it multiplies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parallelmind.engine.native_linear import NativeProduct
from parallelmind.model.packed_linear import LinearGroup


class GreedyHead(NamedTuple):
    """The group of linear layers that holds the head alone, and its product."""

    group: int
    product: NativeProduct

    @staticmethod
    def find(layer: Any, groups: Sequence[LinearGroup]) -> GreedyHead | None:
        """The head, if its product is the kernel's, has the dtype of its weights, and no hook changes it."""
        head = getattr(layer, "base_layer", layer)
        for number, group in enumerate(groups):
            product = group.product
            if group.layers == (head,) and group.computes_in_own_dtype and isinstance(product, NativeProduct):
                return None if head._forward_hooks else GreedyHead(number, product)
        return None

    def find_largest(self, input: Tensor, tokens: Tensor) -> Tensor:
        """Write the most likely token of each row to `tokens`; returns logits that hold nothing.

        input: `[1, rows, inputs]`. tokens: `[rows]` int64; -1 for a row without a finite largest logit.
        """
        self.product.find_largest(input, tokens)
        return input.new_empty((*input.shape[:-1], self.product.weights.outputs))


@contextmanager
def recorded_outputs(layer: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Context whose list holds what a layer has returned, each with a copy."""
    outputs: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, __: Any, output: Tensor) -> None:
        outputs.append((output, output.clone()))

    hook = None if layer is None else layer.register_forward_hook(record)
    try:
        yield outputs
    finally:
        if hook is not None:
            hook.remove()


def is_last(outputs: Sequence[tuple[Tensor, Tensor]], logits: Tensor) -> bool:
    """Whether a layer with these outputs has returned the logits, and nothing has changed them since."""
    if len(outputs) != 1:
        return False
    ((output, copy),) = outputs
    return output.data_ptr() == logits.data_ptr() and torch.equal(copy[0], logits)
