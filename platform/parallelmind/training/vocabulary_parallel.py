"""Embedding and LM head of a sharded model: every worker has a part of the vocabulary.

Tokens travel between the workers in place of weights. A worker computes with its rows of the weights for the
tokens of all workers, so none gathers these weights, which are the largest of many models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from parallelmind.layout import IGNORE
from parallelmind.model.hf_compat import swap_class
from parallelmind.model.shards import first_row, to_mesh
from parallelmind.training.collectives import all_gather, largest_over_workers, reduce_scatter


def shard_vocabulary(model: PreTrainedModel, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Divide embedding and LM head over the workers in place; returns their parameters.

    None if either is not a plain layer, for example because it has an adapter. Ties stay.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        return set()
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for module in (embedding, head):
        for name, weight in module.named_parameters(recurse=False):
            if weight not in moved:
                moved[weight] = to_mesh(weight, mesh)
            setattr(module, name, moved[weight])
    swap_class(embedding, _ParallelEmbedding)
    swap_class(head, ParallelHead)
    if embedding.padding_idx is not None:  # its row gets no gradient
        padding = embedding.padding_idx - first_row(cast(DTensor, embedding.weight))
        embedding.padding_idx = padding if 0 <= padding < _local(embedding.weight).shape[0] else None
    return set(moved.values())


class _ParallelEmbedding(nn.Module):
    """Mixin for an embedding. Workers may have different numbers of tokens."""

    weight: DTensor

    def forward(self, ids: Tensor) -> Tensor:
        count = max(largest_over_workers(ids.numel()), 1)
        every = all_gather(F.pad(ids.flatten(), (0, count - ids.numel())))  # [workers * count]
        local = every - first_row(self.weight)
        with _own_rows(self) as rows:
            is_other = (local < 0) | (local >= rows)
            vectors = super().forward(local.masked_fill(is_other, 0))  # [workers * count, width]
        vectors = vectors.masked_fill(is_other[:, None], 0)
        own = reduce_scatter(vectors)
        return own[: ids.numel()].view(*ids.shape, -1)


class ParallelHead(nn.Module):
    """Mixin for an LM head. All workers call it with the same number of tokens.

    Its logits are those of the tokens of all workers, worker by worker, for this worker's part of the
    vocabulary: `[1, tokens, width]` to `[1, workers * tokens, part]`.
    """

    weight: DTensor

    def forward(self, hidden: Tensor) -> Tensor:
        # In float32, so that the sum of the gradients over the workers is rounded once.
        every = all_gather(hidden[0].float()).to(hidden.dtype)
        with _own_rows(self):
            return super().forward(every)[None]

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sum over this worker's tokens. logits: `[workers * tokens, part]`, float32. labels: `[tokens]`."""
        losses = _CrossEntropy.apply(logits, labels, first_row(self.weight))
        total: Tensor = losses.sum()
        return total


class _CrossEntropy(torch.autograd.Function):
    """Cross entropy of this worker's tokens, from every worker's logits for its part of the vocabulary."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int) -> Tensor:
        every = all_gather(labels)  # [workers * tokens], as all below
        highest = logits.amax(-1) if logits.shape[1] else logits.new_full(every.shape, -torch.inf)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        shifted = logits - highest[:, None]
        local = every - first
        is_own = (local >= 0) & (local < logits.shape[1])
        place = local.clamp(0, max(logits.shape[1] - 1, 0))[:, None]
        target = (
            shifted.gather(1, place)[:, 0].where(is_own, 0.0)
            if logits.shape[1]
            else torch.zeros_like(highest)
        )
        exponents = shifted.exp_()
        sums = torch.stack([exponents.sum(-1), target])
        dist.all_reduce(sums)
        ctx.save_for_backward(exponents.div_(sums[0][:, None]), place, is_own, every != IGNORE)
        losses = (sums[0].log() - sums[1]).masked_fill(every == IGNORE, 0.0)
        return losses.view(-1, len(labels))[dist.get_rank()]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        probabilities, place, is_own, is_target = ctx.saved_tensors
        every = all_gather(gradients[0]) * is_target
        gradient = probabilities * every[:, None]
        if probabilities.shape[1]:
            gradient.scatter_add_(1, place, -(every * is_own)[:, None])
        return gradient, None, None


@contextmanager
def _own_rows(module: nn.Module) -> Iterator[int]:
    """Within it, the parameters of a layer are this worker's rows; yields their number."""
    sharded = dict(module._parameters)
    own: dict[str, Any] = {name: _local(weight) for name, weight in sharded.items() if weight is not None}
    module._parameters.update(own)
    try:
        yield len(own["weight"])
    finally:
        module._parameters.update(sharded)


def _local(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.to_local()
