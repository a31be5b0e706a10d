"""Linear layers for decoding on a CPU, where the time of a small product depends on its form.

On AVX2, `weight @ x.T` takes 0.75 of the time of `x @ weight.T` at 16 rows, 0.35 at 4, and the same at 1. On
a processor without half precision arithmetic, torch multiplies half precision numbers at a quarter of the
speed of float32 or less. There, slices of the weight that fit the cache are converted to float32 and
multiplied; the product is accumulated in float32 and rounded once, as half precision hardware does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_SMALL_BATCHES = range(2, 65)  # rows; above, both forms take the same time
_SLICE = 1 << 20  # elements of a weight that are converted to float32 together: 4 MiB
_SLOW_HALF_PRECISION = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


class _SmallBatchLinear(nn.Linear):
    """`nn.Linear` that computes small batches as `(weight @ x.T).T`."""

    def forward(self, input: Tensor) -> Tensor:
        rows, half = input.reshape(-1, self.in_features), self.weight.dtype in (torch.bfloat16, torch.float16)
        is_faster = _SLOW_HALF_PRECISION and len(rows) > 1 if half else len(rows) in _SMALL_BATCHES
        if not is_faster:
            return super().forward(input)
        if half:
            slices, columns = self.weight.split(max(1, _SLICE // self.in_features)), rows.float().t()
            product = torch.cat([weight.float() @ columns for weight in slices]).t().contiguous()
        else:
            product = (self.weight @ rows.t()).t().contiguous()
        if self.bias is not None:
            product = product + self.bias
        return product.to(input.dtype).reshape(*input.shape[:-1], self.out_features)


@contextmanager
def small_batch_linear(layers: list[nn.Linear]) -> Iterator[None]:
    """Make `layers` fast for small batches within the context.

    Relies on: assigning `__class__` of modules whose class is exactly `nn.Linear`.
    """
    for layer in layers:
        layer.__class__ = _SmallBatchLinear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


def cpu_linears(model: nn.Module) -> list[nn.Linear]:
    """The layers that `small_batch_linear` takes: plain linear layers whose weights are on a CPU."""
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    return [linear for linear in linears if linear.weight.device.type == "cpu"]
