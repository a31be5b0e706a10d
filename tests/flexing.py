"""Long samples for FlexAttention, and contexts in which it runs uncompiled on a CPU, with gradients."""

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
from parallelmind.engine import model_runner
from parallelmind.layout import PADDING, Tokens, arrange, collate
from parallelmind.model import attention
from parallelmind.model.inputs import Tensors, to_tensors
from parallelmind.model.mask import attention_masks
from parallelmind.training.loss import TargetLoss

SHAPES = [
    (150, (40, 70, 9)),
    (37, (60, 5)),
]  # lengths of main and branches: two rows, padding, and no whole number of blocks


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
    """`[tokens, vocab]` logits of all tokens that are not padding."""
    mask = attention_masks(model, batch.placement, config.visibility, batch.is_flat)
    logits = model(
        input_ids=batch.ids,
        attention_mask=mask,
        position_ids=batch.position,
        pos2d=batch.pos2d,
        use_cache=False,
    ).logits
    return logits[batch.segment != PADDING]


@contextmanager
def flex_always_chosen() -> Iterator[None]:
    """Every length counts as long, and every device and dtype as fast enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "FLEX_ABOVE", 0)
        patch.setattr(attention, "_fits_device", lambda device, dtype: True)
        yield


@contextmanager
def flex_decoding() -> Iterator[None]:
    """Engines decode with FlexAttention on every device, with heads of any size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "is_chosen", lambda device: True)
        patch.setattr(model_runner, "fits_heads", lambda model: True)
        yield


@contextmanager
def flex_on_cpu() -> Iterator[None]:
    """FlexAttention without its compiler, with gradients, on a CPU."""
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)
        yield


def gradients(
    model: torch.nn.Module, batch: Tensors, visibility: Visibility, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """All gradients after one batch, flattened; computed in `dtype`."""
    model.zero_grad()
    TargetLoss(model, visibility, dtype)(batch)[0].backward()
    return torch.cat(
        [weight.grad.flatten().float() for weight in model.parameters() if weight.grad is not None]
    )


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that is created within the context."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result
