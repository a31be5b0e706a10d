"""Linear layers as decoding needs them on a CPU.

There, a product of few rows with a large matrix takes its time from the way in which it is asked for, not
from its size. On AVX2, `weight @ x.T` takes 0.75 of the time of `x @ weight.T` at 16 rows and 0.35 at 4, and
as long for one. Where the processor has no arithmetic of its own for half precision, torch multiplies such
numbers at a quarter of the speed of float32 and less: here a slice of the weight at a time becomes float32,
in the processor's cache, and is multiplied as such. The product is summed in float32 and rounded once, as
half precision hardware does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_FEW = range(2, 65)  # rows; above, both ways of asking take the same time
_SLICE = 1 << 20  # numbers of a weight that become float32 together: 4 MiB
_SLOW_HALVES = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


class _FewRows(nn.Linear):
    """What `nn.Linear` computes, asked for the other way round."""

    def forward(self, input: Tensor) -> Tensor:
        rows, half = input.reshape(-1, self.in_features), self.weight.dtype in (torch.bfloat16, torch.float16)
        if not (_SLOW_HALVES and len(rows) > 1 if half else len(rows) in _FEW):
            return super().forward(input)
        if half:
            parts, columns = self.weight.split(max(1, _SLICE // self.in_features)), rows.float().t()
            product = torch.cat([part.float() @ columns for part in parts]).t().contiguous()
        else:
            product = (self.weight @ rows.t()).t().contiguous()
        if self.bias is not None:
            product = product + self.bias
        return product.to(input.dtype).reshape(*input.shape[:-1], self.out_features)


@contextmanager
def small_batch_linear(layers: list[nn.Linear]) -> Iterator[None]:
    """While this lasts, these layers are quick with few rows; they are what they were afterwards."""
    for layer in layers:
        layer.__class__ = _FewRows
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


def cpu_linears(model: nn.Module) -> list[nn.Linear]:
    """The layers that `small_batch_linear` can take: none where another device or another kind of layer does the
    work.
    """
    found = [module for module in model.modules() if type(module) is nn.Linear]
    return [module for module in found if module.weight.device.type == "cpu"]
