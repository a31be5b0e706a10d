"""Linear layers for decoding on a CPU: packed weights, and one product for layers that read the same tensor.

Products are faster with weights in an order of their own, into which they are packed once. Layers that
read the same tensor, such as the projections to queries, keys and values, are found by a forward pass and
computed as one product. Weights in half precision are packed in float32 on a processor that does not multiply
half precision itself; the product is rounded once then, as half precision hardware does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from parallelmind.model import step_ops

_ROWS = 16  # of the product that oneDNN chooses the order of weights for
_multiply: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default


class OneDnnProduct:
    """Product with weights that oneDNN has packed."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: `[outputs, inputs]`. bias: `[outputs]`."""
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS), bias

    def __call__(self, input: Tensor) -> Tensor:
        """`[..., outputs]` of `[..., inputs]`, in the dtype of the weights."""
        return _multiply(input, self.weight, self.bias, "none", [], "")


Product = Callable[[Tensor], Tensor]
Pack = Callable[[Tensor, Tensor | None], Product]


class LinearGroup:
    """Layers that read the same tensor, as one product with their weights as of now.

    reads_tokens: whether the tensor has the form `[1, tokens, inputs]`, with one row for each token.
    product: of weight and bias of all layers.
    computes_in_own_dtype: whether the product has the dtype of the weights.
    """

    def __init__(self, layers: Sequence[nn.Linear], reads_tokens: bool, pack: Pack = OneDnnProduct) -> None:
        self.layers, self.reads_tokens = tuple(layers), reads_tokens
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self._dtype = product_dtype(weight.dtype)
        self.computes_in_own_dtype = self._dtype == weight.dtype
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        bias = torch.cat(biases).to(self._dtype) if biases else None
        self.product = pack(weight.to(self._dtype), bias)

    @property
    def sizes(self) -> list[int]:
        """Number of outputs of each layer."""
        return [layer.out_features for layer in self.layers]

    def __call__(self, input: Tensor) -> Tensor:
        """`[..., sum(sizes)]` of `[..., inputs]`."""
        return self.product(input.to(self._dtype)).to(input.dtype)


class _GroupedLinear(nn.Linear):
    """The first layer of a group: computes the group's product in a step of the engine."""

    group: tuple[int, list[int], tuple[nn.Linear, ...]]  # its number, sizes and other layers

    def forward(self, input: Tensor) -> Tensor:
        if not step_ops.is_running():
            return super().forward(input)
        number, sizes, others = self.group
        product: Tensor = step_ops.linear(input, number, sum(sizes))
        if not others:
            return product
        own, *parts = product.split(sizes, dim=-1)
        for layer, part in zip(others, parts, strict=True):
            layer.__dict__["product"] = (input, part)
        return own


class _SharedLinear(nn.Linear):
    """Another layer of a group: takes its part of the product that the first layer has computed."""

    def forward(self, input: Tensor) -> Tensor:
        product = self.__dict__.pop("product", None)
        if product is None or product[0] is not input:
            return super().forward(input)
        part: Tensor = product[1]
        return part


class PackedLinears:
    """The linear layers of a model on a CPU, which the engine computes in groups."""

    def __init__(self, groups: Sequence[LinearGroup]) -> None:
        """groups: as `recorded_groups` finds them."""
        self.groups = groups
        self._entries = [
            (number, group.sizes, tuple(group.layers[1:])) for number, group in enumerate(groups)
        ]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which the layers compute in groups, in steps of the engine.

        Relies on: assigning `__class__` of modules whose class is exactly `nn.Linear`.
        """
        for group, entry in zip(self.groups, self._entries, strict=True):
            first = group.layers[0]
            first.__dict__["group"] = entry
            set_class(first, _GroupedLinear)
            for layer in entry[2]:
                set_class(layer, _SharedLinear)
        try:
            yield
        finally:
            for group in self.groups:
                for layer in group.layers:
                    set_class(layer, nn.Linear)
                    layer.__dict__.pop("product", None)


def set_class(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Assign `__class__` past the assignment of `nn.Module`, which takes a hundred times as long."""
    object.__setattr__(layer, "__class__", kind)


def multiplies_half_precision(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies numbers of this dtype itself."""
    capabilities = torch.cpu.get_capabilities()
    if dtype == torch.bfloat16:
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return any(capabilities.get(name) for name in ("amx_fp16", "avx512_fp16", "fp16"))


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a product of weights of this dtype is computed."""
    if dtype in (torch.bfloat16, torch.float16) and not multiplies_half_precision(dtype):
        return torch.float32
    return dtype


@contextmanager
def recorded_groups(model: nn.Module, pack: Pack = OneDnnProduct) -> Iterator[list[LinearGroup]]:
    """Context of one forward pass; the list holds its groups afterwards.

    pack: packs weight and bias of a group, in the dtype of the product.

    A group is the layers that have read the same tensor. Layers that the pass has computed more than once, or
    not at all, belong to none.
    """
    groups: list[LinearGroup] = []
    calls: list[tuple[nn.Linear, Tensor]] = []

    def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear), "hooks are on linear layers"
        calls.append((layer, args[0]))

    layers = [module for module in model.modules() if _is_packable(module)]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield groups
        groups += _by_input(calls, pack)
    finally:
        for hook in hooks:
            hook.remove()


def _by_input(calls: Sequence[tuple[nn.Linear, Tensor]], pack: Pack) -> list[LinearGroup]:
    """calls: each layer with its input. They hold the inputs, so that no id is used twice."""
    num_calls = Counter(layer for layer, _ in calls)
    groups: dict[tuple[int, bool], list[tuple[nn.Linear, Tensor]]] = {}
    for layer, input in calls:
        if num_calls[layer] == 1:
            groups.setdefault((id(input), layer.bias is None), []).append((layer, input))
    return [
        LinearGroup([layer for layer, _ in group], group[0][1].dim() == 3, pack) for group in groups.values()
    ]


def _is_packable(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module) is nn.Linear
        and isinstance(weight, Tensor)
        and weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
