"""Linear layers that read the same tensor are found by structure and computed as one product."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor, nn

from parallelmind.model import packed_linear, step_ops
from parallelmind.model.packed_linear import LinearGroup, PackedLinears, recorded_groups


class LinearsOnly:
    """A step that computes linear layers and counts the products."""

    attends = False

    def __init__(self, groups: list[LinearGroup]) -> None:
        self.groups, self.products = groups, 0

    def linear(self, input: Tensor, group: int) -> Tensor:
        self.products += 1
        return self.groups[group](input)

    def attend(self, *_: Any) -> Tensor:
        raise AssertionError("a linear layer attends to nothing")


class Twice(nn.Module):
    """A layer that is called twice, one that is called once, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once, self.never = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.once(self.twice(self.twice(x)))


@contextmanager
def in_step(linears: PackedLinears) -> Any:
    step = LinearsOnly(list(linears.groups))
    with ExitStack() as stack:
        stack.enter_context(linears.active())
        stack.enter_context(step_ops.running(step))
        yield step


def recorded(model: nn.Module, *inputs: Tensor) -> PackedLinears:
    with torch.no_grad(), recorded_groups(model) as groups:
        model(*inputs)
    return PackedLinears(groups)


def names(model: nn.Module, linears: PackedLinears) -> list[list[str]]:
    by_module = {module: name.rpartition(".")[2] for name, module in model.named_modules()}
    return [[by_module[layer] for layer in group.layers] for group in linears.groups]


class Projections(nn.Module):
    """Three layers of one tensor, with and without a bias."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key = (nn.Linear(32, 48, dtype=dtype) for _ in range(2))
        self.gate = nn.Linear(32, 16, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.query(x), self.key(x), self.gate(x)], dim=-1)


def test_the_groups_of_a_transformer_are_its_projections() -> None:
    model = tiny_llama()
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert names(model, recorded(model, torch.arange(5)[None])) == [*layer, *layer, ["lm_head"]]


def test_layers_that_are_not_called_exactly_once_are_left_alone() -> None:
    model = Twice()
    assert names(model, recorded(model, torch.zeros(1, 3, 8))) == [["once"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_native", [True, False])
def test_one_product_gives_what_the_layers_give(
    dtype: torch.dtype, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.float16 and is_native:
        pytest.skip("float16 is multiplied in float32 on most processors")
    monkeypatch.setattr(packed_linear, "multiplies_half_precision", lambda _: is_native)
    model, x = Projections(dtype), torch.randn(1, 5, 32, dtype=dtype)
    linears = recorded(model, x)
    with torch.inference_mode(), in_step(linears) as step:
        product = model(x)
    assert step.products == 2, "query and key are one product; the gate has no bias"
    torch.testing.assert_close(product, model(x))
    assert {type(layer) for layer in (model.query, model.key, model.gate)} == {nn.Linear}


def test_a_shared_layer_that_reads_another_tensor_computes_it_itself() -> None:
    model, x = Projections(torch.float32), torch.randn(1, 5, 32)
    linears = recorded(model, x)
    with torch.inference_mode(), in_step(linears):
        model.query(x)
        other = model.key(x + 1)
    torch.testing.assert_close(other, model.key(x + 1))
