"""A batch on a device, and the arguments that a model takes for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.config import Visibility
from parallelmind.layout import IGNORE, PADDING, Batch
from parallelmind.model.mask import Placement, attention_masks
from parallelmind.model.patch_state import is_patched
from parallelmind.model.transfer import to_device


@dataclass(frozen=True, slots=True)
class Tensors:
    """The arrays of a `layout.Batch` on a device, with its dtypes and shapes, and whether it is flat.

    targets: `[targets]` int64 indices into the flattened rows: the tokens that have a label. labels:
    `[targets]`, their labels.
    """

    ids: Tensor
    segment: Tensor
    pos2d: Tensor
    position: Tensor
    relations: Tensor
    targets: Tensor
    labels: Tensor
    is_flat: bool

    @property
    def placement(self) -> Placement:
        """What visibility depends on."""
        return Placement(self.pos2d[..., 1], self.segment, self.relations)


def to_tensors(batch: Batch, device: torch.device | str = "cpu") -> Tensors:
    """The batch on a device. The host does not wait for copies to an accelerator.

    Targets are found here, on the host: on the device their number would have to be read.
    """
    names = ("ids", "segment", "pos2d", "position", "relations")
    arrays = {name: getattr(batch, name) for name in names}
    arrays["targets"] = np.flatnonzero(batch.labels != IGNORE)
    arrays["labels"] = batch.labels.reshape(-1)[arrays["targets"]]
    tensors = {name: to_device(array, torch.device(device)) for name, array in arrays.items()}
    return Tensors(**tensors, is_flat=batch.is_flat)


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
