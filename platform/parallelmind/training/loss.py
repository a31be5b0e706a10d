"""Loss over the target tokens.

The hidden states at target tokens are gathered, and the LM head runs on those alone, in chunks. With a
vocabulary of 150,000, the float32 logits of one token take 0.6 MB.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from parallelmind.config import Visibility
from parallelmind.layout import IGNORE
from parallelmind.model.inputs import Tensors, decoder_inputs
from parallelmind.model.lm_head import check_lm_head, head_logits
from parallelmind.model.structure import causal_lm, decoder
from parallelmind.training.collectives import largest_over_workers
from parallelmind.training.vocabulary_parallel import ParallelHead

_MAX_LOGITS = 1 << 24  # of one chunk: 64 MiB in float32
_KEPT_CHUNKS = 4  # their logits stay for the backward pass, which computes those of other chunks again


class TargetLoss(nn.Module):
    """`target_loss` as a module; FSDP gathers the weights of a sharded model around its forward.

    dtype: compute dtype, by autocast if it is not float32.
    """

    def __init__(self, model: nn.Module, visibility: Visibility, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.visibility, self.dtype = model, visibility, dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(self, batch: Tensors) -> tuple[Tensor, int]:
        with self._autocast():
            return target_loss(self.model, batch, self.visibility)

    def check_head(self) -> None:
        """Raise UserError as `check_lm_head` does. FSDP gathers the weights around it, too."""
        with self._autocast():
            check_lm_head(causal_lm(self.model))

    def _autocast(self) -> AbstractContextManager[None]:
        exact = self.dtype == torch.float32
        return nullcontext() if exact else torch.autocast(self.device.type, self.dtype)


def target_loss(model: nn.Module, batch: Tensors, visibility: Visibility) -> tuple[Tensor, int]:
    """Float32 cross entropy summed over the target tokens, a scalar with gradients, and their number."""
    inner = causal_lm(model)
    inputs = decoder_inputs(inner, batch, visibility)
    hidden = decoder(inner)(**inputs).last_hidden_state  # [batch, seq, width]
    hidden, labels = hidden.flatten(0, 1).index_select(0, batch.targets), batch.labels  # [targets, width]
    if isinstance(inner.get_output_embeddings(), ParallelHead):
        hidden, labels = _pad_targets(hidden, labels)
    size = max(_MAX_LOGITS // inner.config.get_text_config(decoder=True).vocab_size, 1)
    *chunks, last = zip(hidden.split(size), labels.split(size), strict=True)
    total = _chunk_loss(inner, *last)
    for number, chunk in enumerate(chunks, start=1):
        if number < _KEPT_CHUNKS:
            total = total + _chunk_loss(inner, *chunk)
        else:
            total = total + checkpoint(_chunk_loss, inner, *chunk, use_reentrant=False)
    return total, len(batch.labels)


def _pad_targets(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows without a label, up to the largest number of targets that a worker has."""
    missing = max(largest_over_workers(len(labels)), 1) - len(labels)
    return F.pad(hidden, (0, 0, 0, missing)), F.pad(labels, (0, missing), value=IGNORE)


def _chunk_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    head, logits = model.get_output_embeddings(), head_logits(model, hidden).float()
    if isinstance(head, ParallelHead):
        return head.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum")
