"""Long samples for FlexAttention, and what lets it run on a CPU, where it is slow, uncompiled and made for
inference only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallelmind.config import RopeConfig, Visibility
from parallelmind.layout import PADDING, Tokens, arrange, collate
from parallelmind.model import attention
from parallelmind.model.mask import attention_masks
from parallelmind.training.loss import TargetLoss, Tensors, to_tensors

SHAPES = [
    (150, (40, 70, 9)),
    (37, (60, 5)),
]  # main and branches: a batch of two, of no whole number of blocks, with padding


def long_batch(
    config: RopeConfig, shapes=SHAPES, vocabulary: int = 128, device: torch.device | str = "cpu"
) -> Tensors:
    random = np.random.default_rng(0)

    def text(length: int) -> list[int]:
        return random.integers(3, vocabulary, length).tolist()

    samples = [Tokens.of(text(main), [text(length) for length in branches]) for main, branches in shapes]
    return to_tensors(collate([arrange(sample, config) for sample in samples], pad_id=0), device)


@torch.no_grad()
def real_logits(model: torch.nn.Module, batch: Tensors, config: RopeConfig) -> torch.Tensor:
    """`[real tokens, vocab]`: nothing is promised of padding."""
    mask = attention_masks(model, batch.pos2d[..., 1], batch.sequence, config.visibility)
    logits = model(
        input_ids=batch.ids,
        attention_mask=mask,
        position_ids=batch.position,
        pos2d=batch.pos2d,
        use_cache=False,
    ).logits
    return logits[batch.sequence != PADDING]


@contextmanager
def chosen() -> Iterator[None]:
    """Every length is long and every device and type are fast enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "FLEX_ABOVE", 0)
        patch.setattr(attention, "_fits_device", lambda device, dtype: True)
        yield


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """The kernel's mathematics without its compiler, with gradients too."""
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)
        yield


def gradients(
    model: torch.nn.Module, batch: Tensors, visibility: Visibility, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Of everything that is trained, in one row, after one batch; computed in `dtype`."""
    model.zero_grad()
    TargetLoss(model, visibility, dtype)(batch)[0].backward()
    return torch.cat(
        [weight.grad.flatten().float() for weight in model.parameters() if weight.grad is not None]
    )


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made within."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for part in tree_leaves(made):
            if isinstance(part, torch.Tensor):
                self.bytes = max(self.bytes, part.untyped_storage().nbytes())
        return made
