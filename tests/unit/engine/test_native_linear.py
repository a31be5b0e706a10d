"""The kernel of products with packed weights against products in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parallelmind.engine import native_linear
from parallelmind.engine.native import kernels
from parallelmind.engine.native_linear import NativeProduct, pack
from parallelmind.model.packed_linear import OneDnnProduct, multiplies_half_precision

pytestmark = pytest.mark.skipif(kernels() is None, reason="needs a C++ compiler")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}
SHAPES = [(1, 1), (33, 7), (64, 16), (95, 31), (160, 64)]  # outputs and inputs


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param == torch.bfloat16 and not isinstance(
        pack(torch.zeros(1, 1).bfloat16(), None), NativeProduct
    ):
        pytest.skip("this processor multiplies bfloat16 by other means")
    result: torch.dtype = request.param
    return result


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 11, 12, 13, 24, 25, 40])
def test_products_are_exact_to_rounding(
    rows: int, outputs: int, inputs: int, has_bias: bool, dtype: torch.dtype
) -> None:
    weight, input = random(outputs, inputs, dtype=dtype), random(1, rows, inputs, dtype=dtype)
    bias = random(outputs, dtype=dtype) if has_bias else None
    product = NativeProduct(weight, bias)(input)
    exact = torch.nn.functional.linear(
        input.double(), weight.double(), None if bias is None else bias.double()
    )
    assert product.dtype == dtype
    assert product.shape == exact.shape
    torch.testing.assert_close(product.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_row_does_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    product, rows = NativeProduct(random(95, 64, dtype=dtype), None), random(41, 64, dtype=dtype)
    together = product(rows)
    rows[1:] = float("nan")
    for count in (1, 7, 12, 13, 25, 41):
        assert torch.equal(product(rows[:count])[0], together[0])


@pytest.mark.parametrize("outputs", [1, 33, 64, 1000])
@pytest.mark.parametrize("rows", [1, 13, 40])
def test_the_first_largest_output_of_each_row(rows: int, outputs: int, dtype: torch.dtype) -> None:
    """Coarse weights make many outputs equal."""
    weight, input = random(outputs, 16, dtype=dtype).round(), random(rows, 16, dtype=dtype).round()
    input[0], input[-1] = 0, 1
    product = NativeProduct(weight, random(outputs, dtype=dtype).round())
    logits = product(input)
    found = torch.empty(rows, dtype=torch.int64)
    product.find_largest(input, found)
    first = (logits == logits.max(dim=-1, keepdim=True).values).int().argmax(dim=-1)
    assert torch.equal(found, first)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_have_no_largest_output(value: float, dtype: torch.dtype) -> None:
    weight, input = torch.ones(70, 16, dtype=dtype), torch.ones(3, 16, dtype=dtype)
    input[1, 5] = value
    found = torch.empty(3, dtype=torch.int64)
    NativeProduct(weight, None).find_largest(input, found)
    assert found.tolist() == [0, -1, 0]
    weight[40] = float("nan")
    NativeProduct(weight, None).find_largest(input, found)
    assert found.tolist() == [-1, -1, -1]


def test_an_input_with_gaps_between_its_rows(dtype: torch.dtype) -> None:
    weight, wide = random(32, 16, dtype=dtype), random(5, 40, dtype=dtype)
    product = NativeProduct(weight, None)
    assert torch.equal(product(wide[:, 3:19]), product(wide[:, 3:19].contiguous()))


def test_no_rows_give_no_rows(dtype: torch.dtype) -> None:
    assert NativeProduct(random(32, 16, dtype=dtype), None)(random(0, 16, dtype=dtype)).shape == (0, 32)


@pytest.mark.skipif(
    not multiplies_half_precision(torch.bfloat16),
    reason="bfloat16 is multiplied in float32 on this processor",
)
def test_a_processor_with_units_for_matrices_uses_them_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"avx512_bf16": True, "amx_bf16": True}
    monkeypatch.setattr(native_linear.torch.cpu, "get_capabilities", lambda: has)
    weight = random(64, 32, dtype=torch.bfloat16)
    assert isinstance(pack(weight, None), OneDnnProduct)
    assert isinstance(pack(weight.float(), None), NativeProduct)
