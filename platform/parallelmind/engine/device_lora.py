"""Low-rank adapters by row on an accelerator: samples with different adapters share a forward pass.

The adapters of a layer lie side by side in one narrow pair of matrices. A product gives what all of them make
of a row, and all but those of the row's own adapter becomes zero before it is multiplied up. Shapes and
addresses do not depend on which row has which adapter, so such a step can be captured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from parallelmind.engine.batch import ModelInput
from parallelmind.model import step_ops
from parallelmind.model.packed_linear import set_class
from parallelmind.model.penalty import adapted_layers
from parallelmind.model.structure import causal_lm

_NO_ADAPTER = -1


class _RowLinear(LoraLinear):
    """An adapted layer in a step of the engine."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not step_ops.is_running():
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        lora, adapters = self.__dict__["by_row"]
        added: Tensor = lora.add(self.base_layer(x), x, adapters)
        return added


class DeviceLora:
    """The adapters of a model whose every adapted layer reads one row for each token.

    `is_possible` says for which models this holds. An adapter that is added or removed needs a new object.
    """

    def __init__(self, model: PeftModel) -> None:
        self._versions = tuple(model.peft_config)
        head = causal_lm(model).get_output_embeddings()
        self._adapters = {
            module: _LayerAdapters(module, self._versions, reads_sampled=module is head)
            for module in model.modules()
            if isinstance(module, LoraLinear)
        }
        self._rows = self._sampled_rows = torch.empty(0, dtype=torch.int64)
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def numbered(self, inputs: ModelInput) -> ModelInput:
        """The input with all adapters of the model, so that their numbers stay from step to step."""
        known = {version: number for number, version in enumerate(self._versions)}
        numbers = np.array([known.get(version, _NO_ADAPTER) for version in inputs.adapters])
        return replace(inputs, adapters=self._versions, adapter=numbers[inputs.adapter])

    def begin(self, rows: Tensor, sampled: Tensor) -> None:
        """Set the adapters of a step's tokens, and the tokens that the head reads."""
        self._rows, self._sampled_rows = rows, rows[sampled]
        self._masks.clear()

    def add(self, product: Tensor, input: Tensor, adapters: _LayerAdapters) -> Tensor:
        """`[…, outputs]` of the product of a base layer with `[…, inputs]`, and what adapters add to it."""
        down = input.flatten(0, -2) @ adapters.down
        own = down.where(self._mask(adapters), 0)  # a NaN of another adapter would stay if it was multiplied
        return torch.addmm(product.flatten(0, -2), own, adapters.up).view_as(product)

    def _mask(self, adapters: _LayerAdapters) -> Tensor:
        """`[rows, ranks]` whether a rank belongs to the adapter of the row. Most layers have the same."""
        key = adapters.ranks, adapters.reads_sampled
        if key not in self._masks:
            rows = self._sampled_rows if adapters.reads_sampled else self._rows
            self._masks[key] = rows[:, None] == adapters.owners
        return self._masks[key]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Context in which adapted layers compute by row in steps of the engine.

        Relies on: assigning `__class__` of peft's layers.
        """
        for layer, adapters in self._adapters.items():
            layer.__dict__["by_row"] = self, adapters
            set_class(layer, _RowLinear)
        try:
            yield
        finally:
            for layer in self._adapters:
                set_class(layer, LoraLinear)
                del layer.__dict__["by_row"]


class _LayerAdapters:
    """All adapters of one layer, in the dtype of its base.

    down: `[inputs, ranks]`. up: `[ranks, outputs]`, scaled. owners: `[ranks]` number of the adapter of each.
    ranks: the same as (number, rank) pairs. reads_sampled: whether the layer reads the sampled tokens alone.
    """

    def __init__(self, layer: LoraLinear, versions: Collection[str], reads_sampled: bool) -> None:
        weight: Any = layer.base_layer.weight
        own = [(number, version) for number, version in enumerate(versions) if version in layer.lora_A]
        downs = [_weight(layer.lora_A[version]) for _, version in own]
        ups = [_weight(layer.lora_B[version]) * layer.scaling[version] for _, version in own]
        self.ranks = tuple((number, len(down)) for (number, _), down in zip(own, downs, strict=True))
        self.down = torch.cat(downs).to(weight.dtype).t()
        self.up = torch.cat(ups, dim=1).to(weight.dtype).t()
        owners = [number for number, rank in self.ranks for _ in range(rank)]
        self.owners = torch.tensor(owners, device=weight.device)
        self.reads_sampled = reads_sampled


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach()
    return weight


@contextmanager
def recorded_readers(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Context of one forward pass; the set holds the linear layers that read one row for each token, once."""
    readers: set[nn.Module] = set()
    others: set[nn.Module] = set()

    def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        (others if layer in readers or args[0].dim() != 3 else readers).add(layer)

    layers = [module for module in model.modules() if type(module) is nn.Linear]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield readers
        readers -= others
    finally:
        for hook in hooks:
            hook.remove()


def is_possible(model: nn.Module, readers: Collection[nn.Module]) -> bool:
    """Whether all that peft has added to a model is plain LoRA on layers of `recorded_readers`."""
    return all(_is_plain(module) and module.base_layer in readers for module in adapted_layers(model))


def _is_plain(layer: nn.Module) -> bool:
    return (
        type(layer) is LoraLinear
        and isinstance(layer, LoraLayer)
        and not (layer.lora_variant or layer.merged or layer.fan_in_fan_out or any(layer.lora_bias.values()))
    )
