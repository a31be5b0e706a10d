"""Choice of attention for whole sequences: a dense mask, FlexAttention's block mask, or blocks of queries.

The type of the mask selects the implementation: a patched model that is set to sdpa passes a block mask to
FlexAttention and any other mask to SDPA (`hf_compat.OwnAttention`). No state is switched between calls, so
recomputed layers, decoding and other threads are not affected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from parallelmind.layout import Batch
from parallelmind.model.hf_compat import FLEX, SDPA, attention_name, hands_over_masks, has_own_attention
from parallelmind.model.patch_state import is_patched, rope_config
from parallelmind.model.structure import causal_lm, text_modules
from parallelmind.visibility import learns_penalty

# Number of tokens above which a sequence is computed with FlexAttention. It is a default, not a measurement:
# experiments/LOG.md records no run of the kernel on a GPU, and `make gpu-day` measures both attentions. It
# lies between lengths that suit SDPA and lengths at which skipped blocks outweigh the overhead of the kernel.
# It is a constant, so that a resumed run makes the same choice.
FLEX_ABOVE = 2048

BLOCKS = "sdpa by blocks"  # `block_attention`, for trees and rows of several samples on a CPU

# Supported head sizes. The kernel rejects smaller heads, and the tiles of larger heads do not fit the shared
# memory of some GPUs.
_HEAD_DIMS = range(16, 129)
# Bytes of shared memory that the kernel's default tiles need. A100 and the H series have them, consumer GPUs
# do not.
_SHARED_MEMORY = 160 * 1024


def length_bucket(length: int) -> int:
    """The power of two at or above `length`. Lengths in one bucket are treated alike."""
    return 1 << max(length - 1, 0).bit_length()


def compute_dtype(model: PreTrainedModel | PeftModel) -> torch.dtype:
    """The dtype in which the model computes now: autocast's where it is enabled, else the weights'."""
    device_type = model.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else model.dtype


def choose_attention(model: nn.Module, length: int, dtype: torch.dtype, is_flat: bool = True) -> str:
    """Name of the attention for a whole sequence: flex_attention, `BLOCKS`, or what the model is set to.

    The choice is the same within a bucket of lengths. A learned sibling penalty is computed by blocks on a
    CPU, and with dense masks elsewhere. dtype: what the model computes in. is_flat: whether
    every row is one sample of main and branches alone.
    """
    inner = causal_lm(model)
    configured = attention_name(inner)
    learns = is_patched(inner) and learns_penalty(rope_config(inner))
    is_long = not learns and length_bucket(length) > FLEX_ABOVE and _fits_device(inner.device, dtype)
    is_sparse = inner.device.type == "cpu" and (learns or not is_flat)
    if not (is_long or is_sparse):
        return configured
    # An unpatched model builds its own masks. A model on eager may compute something that sdpa does not.
    if not (configured == SDPA and is_patched(inner) and has_own_attention(inner) and _takes_backends(inner)):
        return configured
    if is_long and fits_heads(inner):
        return FLEX
    return BLOCKS if is_sparse else configured


def _fits_device(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether FlexAttention is fast with this device and dtype; in float32 it cannot use tensor cores."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= _SHARED_MEMORY


def _takes_backends(model: PreTrainedModel) -> bool:
    """Whether every layer hands over its mask and has no dropout of attention weights."""
    return hands_over_masks(model) and not any(
        _attribute_values(text_modules(model).values(), "attention_dropout")
    )


def fits_heads(model: PreTrainedModel) -> bool:
    """Whether FlexAttention takes the head sizes of every layer of a model."""
    modules = text_modules(model).values()
    head_dims = _attribute_values(modules, "head_dim", "head_size", "qk_head_dim", "v_head_dim")
    return head_dims <= set(_HEAD_DIMS)


def _attribute_values(modules: Iterable[nn.Module], *names: str) -> set[Any]:
    return {getattr(module, name) for module in modules for name in names if hasattr(module, name)}


class AttentionLogger:
    """Logs which attention reads the batches of each length bucket.

    dtype: what the model computes in. log: receives one line at a time.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, log: Callable[[str], None]) -> None:
        self._model, self._dtype, self._log = model, dtype, log
        self._seen = set[tuple[int, bool]]()  # (bucket, whether the batch was flat)
        self._longest_logged: dict[str, int] = {}  # attention -> its longest bucket

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the same batches; log a line before the first one that no line covers."""
        for batch in batches:
            kind = length_bucket(batch.ids.shape[1]), batch.is_flat
            if kind not in self._seen:
                self._seen.add(kind)
                self._log_choice(*kind)
            yield batch

    def _log_choice(self, bucket: int, is_flat: bool) -> None:
        name = choose_attention(self._model, bucket, self._dtype, is_flat)
        if bucket > self._longest_logged.get(name, 0):
            self._longest_logged[name] = bucket
            self._log(f"attention: {name} for up to {bucket} tokens")
