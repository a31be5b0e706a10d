"""The loss over target tokens, without logits for any other token.

The decoder's hidden states are gathered where there is a label, and the head runs on those, a chunk at a
time. A vocabulary of 150,000 would otherwise cost 0.6 MB of float32 logits for every token of main.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from parallelmind.config import Visibility
from parallelmind.layout import IGNORE, PADDING, Batch
from parallelmind.model.lm_head import head_logits
from parallelmind.model.mask import attention_masks
from parallelmind.model.patch import is_patched
from parallelmind.model.structure import causal_lm, decoder

_LOGITS = 1 << 24  # that exist at one time: 64 MiB in float32


@dataclass(frozen=True, slots=True)
class Tensors:
    """A `layout.Batch` on a device: int64, `[batch, seq]`, and `[batch, seq, 2]` for pos2d."""

    ids: Tensor
    sequence: Tensor
    pos2d: Tensor
    position: Tensor
    labels: Tensor


def to_tensors(batch: Batch, device: torch.device | str = "cpu") -> Tensors:
    return Tensors(*(torch.from_numpy(getattr(batch, name)).to(device) for name in Tensors.__slots__))


class TargetLoss(nn.Module):
    """`target_loss` as a module, whose forward is where a sharded model gathers its weights.

    dtype: what to compute in, where that is not the type of the weights.
    """

    def __init__(self, model: nn.Module, visibility: Visibility, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.visibility, self.dtype = model, visibility, dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(self, batch: Tensors) -> tuple[Tensor, int]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return target_loss(self.model, batch, self.visibility)


def target_loss(model: nn.Module, batch: Tensors, visibility: Visibility) -> tuple[Tensor, int]:
    """Summed float32 cross entropy over the target tokens (a scalar with gradients), and how many there
    are.
    """
    inner = causal_lm(model)
    hidden = decoder(inner)(
        **decoder_inputs(inner, batch, visibility)
    ).last_hidden_state  # [batch, seq, width]
    wanted = batch.labels != IGNORE
    hidden, labels = hidden[wanted], batch.labels[wanted]  # [targets, width], [targets]
    size = max(_LOGITS // inner.config.get_text_config(decoder=True).vocab_size, 1)
    *before, last = zip(hidden.split(size), labels.split(size), strict=True)
    # The backward pass begins with the last chunk, so its logits can stay: one chunk's exist at a time all
    # the same.
    total = _chunk_loss(inner, *last)
    for part, target in before:
        total = total + checkpoint(_chunk_loss, inner, part, target, use_reentrant=False)
    return total, len(labels)


def _chunk_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head_logits(model, hidden).float(), labels, reduction="sum")


def decoder_inputs(model: PreTrainedModel, batch: Tensors, visibility: Visibility) -> dict[str, Any]:
    """What the decoder is called with: ids, and mask and coordinates of the layout if it is patched."""
    if not is_patched(model):  # one branch per row: plain sequences, padded on the right
        return {
            "input_ids": batch.ids,
            "attention_mask": (batch.sequence != PADDING).long(),
            "use_cache": False,
        }
    return {
        "input_ids": batch.ids,
        "attention_mask": attention_masks(model, batch.pos2d[..., 1], batch.sequence, visibility),
        "position_ids": batch.position,
        "pos2d": batch.pos2d,
        "use_cache": False,
    }
