"""The learned sibling penalties of a model's adapters, as a step of the engine takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.model.penalty import penalties_by_layer


class SiblingPenalties:
    """Empty for a model that does not learn its penalty."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._by_layer = penalties_by_layer(model)
        self._tables: dict[tuple[str, ...], Mapping[int, Tensor]] = {}  # by versions of adapters

    def __bool__(self) -> bool:
        return bool(self._by_layer)

    def of(self, versions: Sequence[str]) -> Mapping[int, Tensor]:
        """By layer, `[versions, heads]` float32 numbers that multiply the scores of siblings, which are -1.

        versions: of the step's adapters. One without penalties has the starting value.
        """
        key = tuple(versions)
        if key not in self._tables:
            self._tables[key] = {
                layer: torch.stack([penalty.of(version) for version in key]).float()
                for layer, penalty in self._by_layer.items()
            }
        return self._tables[key]
