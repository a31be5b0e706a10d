"""The loss over target tokens, without logits for any other token.

The decoder's hidden states are gathered where there is a label, and the head runs on those, a chunk at a time. A
vocabulary of 150,000 would otherwise cost 0.6 MB of float32 logits for every token of main.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from parallelmind.config import Visibility
from parallelmind.errors import UserError
from parallelmind.layout import IGNORE, Batch
from parallelmind.model.mask import for_attention, visible
from parallelmind.model.patch import is_patched

_CHUNK = 1024  # targets whose logits exist at one time


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


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside; LoRA layers live in it, so they stay active."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def target_loss(model: nn.Module, batch: Tensors, visibility: Visibility) -> tuple[Tensor, int]:
    """Summed float32 cross entropy over the target tokens (a scalar with gradients), and how many there are."""
    inner = causal_lm(model)
    hidden = inner.base_model(**decoder_inputs(inner, batch, visibility)).last_hidden_state  # [batch, seq, width]
    wanted = batch.labels != IGNORE
    hidden, labels = hidden[wanted], batch.labels[wanted]  # [targets, width], [targets]
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip(hidden.split(_CHUNK), labels.split(_CHUNK), strict=True):
        total = total + checkpoint(_chunk_loss, inner.get_output_embeddings(), part, target, use_reentrant=False)
    return total, len(labels)


def _chunk_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), labels, reduction="sum")


def decoder_inputs(model: PreTrainedModel, batch: Tensors, visibility: Visibility) -> dict[str, Any]:
    """What the decoder is called with: ids, mask and coordinates of the layout."""
    seen = visible(batch.pos2d[..., 1], batch.sequence, visibility)
    inputs = {
        "input_ids": batch.ids,
        "attention_mask": for_attention(seen, str(model.config._attn_implementation), model.dtype),
        "position_ids": batch.position,
        "use_cache": False,
    }
    return {**inputs, "pos2d": batch.pos2d} if is_patched(model) else inputs


@torch.no_grad()
def refuse_unusual_head(model: nn.Module) -> None:
    """Raises UserError if the model's logits are not its head applied to its hidden states (soft-capped or scaled ones)."""
    inner = causal_lm(model)
    ids = torch.tensor([[1, 2]], device=inner.device)
    hidden = inner.base_model(input_ids=ids, use_cache=False).last_hidden_state
    plain = inner.get_output_embeddings()(hidden)
    if not torch.allclose(inner(input_ids=ids, use_cache=False).logits.float(), plain.float(), rtol=1e-2, atol=1e-2):
        kind = inner.config.model_type
        raise UserError(f"base_model: {kind} caps or scales its logits, which this loss does not; choose another model")
