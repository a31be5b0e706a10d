"""A batch on a device, and the arguments that a model takes for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.config import Visibility
from parallelmind.layout import PADDING, Batch
from parallelmind.model.mask import Placement, attention_masks
from parallelmind.model.patch_state import is_patched


@dataclass(frozen=True, slots=True)
class Tensors:
    """The arrays of a `layout.Batch` on a device, with its dtypes and shapes, and whether it is flat."""

    ids: Tensor
    segment: Tensor
    pos2d: Tensor
    position: Tensor
    labels: Tensor
    relations: Tensor
    is_flat: bool

    @property
    def placement(self) -> Placement:
        """What visibility depends on."""
        return Placement(self.pos2d[..., 1], self.segment, self.relations)


def to_tensors(batch: Batch, device: torch.device | str = "cpu") -> Tensors:
    """The batch on a device."""
    names = ("ids", "segment", "pos2d", "position", "labels", "relations")
    arrays = {name: torch.from_numpy(getattr(batch, name)).to(device) for name in names}
    return Tensors(**arrays, is_flat=batch.is_flat)


def decoder_inputs(model: PreTrainedModel, batch: Tensors, visibility: Visibility) -> dict[str, Any]:
    """Keyword arguments of the decoder: ids and, for a patched model, mask and coordinates of the layout."""
    if not is_patched(model):  # one branch per row: plain sequences, padded on the right
        assert batch.is_flat, "only a patched model reads trees and packed rows"
        return {
            "input_ids": batch.ids,
            "attention_mask": (batch.segment != PADDING).long(),
            "use_cache": False,
        }
    return {
        "input_ids": batch.ids,
        "attention_mask": attention_masks(model, batch.placement, visibility, batch.is_flat),
        "position_ids": batch.position,
        "pos2d": batch.pos2d,
        "use_cache": False,
    }
