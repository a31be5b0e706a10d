"""Learned embeddings of branches: each is added to the embeddings of its branch's tokens.

They are the stream embeddings of Multi-Stream LLMs (Su et al., 2026, https://arxiv.org/abs/2605.12460). A
patched model gets a small module in its decoder. peft copies it for every adapter (`modules_to_save`), so it
is trained, saved, switched and deleted with the adapter. Without an adapter all embeddings are zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.model.forward_context import CURRENT_CALL
from parallelmind.model.structure import decoder

NAME = "branch_embedding"  # of the module in the decoder, and in the name of its weight


class BranchEmbedding(nn.Module):
    """weight: float32 `[count, hidden]`."""

    def __init__(self, count: int, hidden: int, stride: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, hidden, device=device), requires_grad=False)
        self._stride = stride

    def forward(self, branch: Tensor) -> Tensor:
        """`[..., hidden]` embeddings of `[...]` branch coordinates; zero at coordinate 0.

        Branches beyond the last embedding begin again with the first.
        """
        number = branch // self._stride
        embeddings = F.embedding((number - 1) % len(self.weight), self.weight)
        return embeddings * (number > 0)[..., None]


def add_branch_embeddings(model: PreTrainedModel, config: RopeConfig) -> RemovableHandle:
    """Give the decoder embeddings of branches; returns the hook that adds them to those of tokens."""
    tokens: Any = model.get_input_embeddings()
    device, hidden = tokens.weight.device, tokens.weight.shape[1]
    own = BranchEmbedding(config.branch_embeddings, hidden, config.branch_stride, device)
    decoder(model).add_module(NAME, own)
    handle: RemovableHandle = tokens.register_forward_hook(_add)
    return handle


def remove_branch_embeddings(model: PreTrainedModel) -> None:
    """Undo `add_branch_embeddings`, but for the hook."""
    decoder(model)._modules.pop(NAME, None)


def branch_embeddings(model: PreTrainedModel, pos2d: Tensor | None) -> Tensor | None:
    """`[batch, seq, hidden]` of the tokens at `[batch, seq, 2]` coordinates; None for a model without any."""
    module = decoder(model)._modules.get(NAME)
    return None if module is None or pos2d is None else module(pos2d[..., 0])


def with_branches(tokens: Tensor, branches: Tensor | None) -> Tensor:
    """Embeddings of tokens with those of their branches, if there are any."""
    return tokens if branches is None else tokens + branches.to(tokens.dtype)


def _add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Not bound to a model: peft copies modules with their hooks."""
    call = CURRENT_CALL.get()
    return with_branches(output, call.embeddings if call else None)
