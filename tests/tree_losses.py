"""The loss of a batch of `pm.tree_batch`, computed by the project's own training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from parallelmind.config import RopeConfig
from parallelmind.layout import IGNORE
from parallelmind.model.inputs import Tensors
from parallelmind.training.loss import target_loss


def training_loss(model: nn.Module, batch: BatchEncoding, config: RopeConfig) -> tuple[Tensor, int]:
    """The sum over all targets, and their number."""
    labels = torch.full_like(batch["labels"], IGNORE)
    labels[:, :-1] = batch["labels"][:, 1:]
    labels = labels.flatten()
    (targets,) = torch.nonzero(labels != IGNORE, as_tuple=True)
    names = ("input_ids", "segment", "pos2d", "position_ids")
    own = Tensors(
        *(batch[name] for name in names), batch["relations"], targets, labels[targets], is_flat=False
    )
    return target_loss(model, own, config.visibility)
