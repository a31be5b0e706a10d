"""The kernel that adds adapters by row computes what peft computes for one adapter."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

from parallelmind.engine.native_lora import LoraRows
from parallelmind.model.packed_linear import LinearGroup

INPUTS, SIZES, RANKS = 50, (33, 7), {"a": 3, "b": 16}
ROWS = [0, 0, 1, 2, 1, *[1] * 10]  # indices into ADAPTERS
ADAPTERS = ("a", "b", "base")


def adapted_model(dtype: torch.dtype) -> peft.PeftModel:
    """Two linear layers in this dtype, and adapters in float32; the second layer has no adapter "a"."""
    torch.manual_seed(0)
    plain = nn.ModuleDict({name: nn.Linear(INPUTS, size) for name, size in zip("qk", SIZES, strict=True)})
    model = None
    for name, rank in RANKS.items():
        targets = ["q"] if name == "a" else ["q", "k"]
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)
        if model is None:
            model = peft.get_peft_model(plain.to(dtype), config, name)
        else:
            model.add_adapter(name, config)
    for key, weight in model.named_parameters():
        if "lora_" in key:
            weight.data = weight.data.float()
    return model


def expected(model: peft.PeftModel, input: Tensor) -> Tensor:
    """Computed in float64, row by row."""
    rows = []
    for adapter, row in zip((ADAPTERS[index] for index in ROWS), input[0].double(), strict=True):
        parts = []
        for layer in (model.base_model.model[name] for name in "qk"):
            part = torch.zeros(layer.out_features, dtype=torch.float64)
            if adapter in layer.lora_A:
                down, up = layer.lora_A[adapter].weight.double(), layer.lora_B[adapter].weight.double()
                part = layer.scaling[adapter] * (up @ (down @ row))
            parts.append(part)
        rows.append(torch.cat(parts))
    return torch.stack(rows)[None]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@torch.no_grad()
def test_each_row_gets_its_own_adapter(dtype: torch.dtype, error: float) -> None:
    model = adapted_model(dtype)
    layers = [model.base_model.model[name].base_layer for name in "qk"]
    rows = LoraRows(model, [LinearGroup(layers, reads_tokens=True)])
    rows.begin(SimpleNamespace(adapter=np.array(ROWS), adapters=ADAPTERS, logits_indices=np.array([0])))
    input, product = (
        torch.randn(1, len(ROWS), INPUTS).to(dtype),
        torch.ones(1, len(ROWS), sum(SIZES)).to(dtype),
    )
    rows.add(0, input, product)
    want = 1 + expected(model, input)
    assert (product - want).abs().max() < error * want.abs().max()
    assert (product[0, 3] == 1).all(), "the base has no adapter"


@torch.no_grad()
def test_the_head_reads_the_sampled_tokens_in_their_order() -> None:
    """Also where they are as many as all tokens, as with log-probabilities of a prompt."""
    model = adapted_model(torch.float32)
    layers = [model.base_model.model[name].base_layer for name in "qk"]
    groups = [LinearGroup(layers, reads_tokens=True)]
    order, adapter = np.array([1, 2, 0]), np.array([0, 0, 1])
    head, other = LoraRows(model, groups, model.base_model.model["q"]), LoraRows(model, groups)
    head.begin(SimpleNamespace(adapter=adapter, adapters=ADAPTERS, logits_indices=order))
    other.begin(SimpleNamespace(adapter=adapter[order], adapters=ADAPTERS, logits_indices=order))
    input, products = torch.randn(1, 3, INPUTS), [torch.zeros(1, 3, sum(SIZES)) for _ in range(2)]
    for rows, product in zip((head, other), products, strict=True):
        rows.add(0, input, product)
    assert products[0].equal(products[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_row_does_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    """With more rows, ranks and outputs than the kernel computes together."""
    torch.manual_seed(0)
    layer = nn.ModuleDict({"q": nn.Linear(64, 1100)}).to(dtype)
    config = peft.LoraConfig(r=40, target_modules=["q"], init_lora_weights=False)
    model = peft.get_peft_model(layer, config, "a")
    adapted = model.base_model.model["q"]
    rows = LoraRows(model, [LinearGroup([adapted.base_layer], reads_tokens=True)])
    input = torch.randn(1, 30, 64).to(dtype)

    def added(count: int) -> Tensor:
        rows.begin(
            SimpleNamespace(adapter=np.zeros(count, int), adapters=("a",), logits_indices=np.array([0]))
        )
        product = torch.zeros(1, count, 1100, dtype=dtype)
        rows.add(0, input[:, :count].clone(), product)
        return product[0]

    together = added(30)
    down, up = (layers["a"].weight.double() for layers in (adapted.lora_A, adapted.lora_B))
    exact = adapted.scaling["a"] * (input[0].double() @ down.T @ up.T)
    assert (together - exact).abs().max() < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[
        dtype
    ] * exact.abs().max()
    input[:, 1:] = float("nan")
    for count in (1, 2, 12, 13, 25):
        assert torch.equal(added(count)[0], together[0])
