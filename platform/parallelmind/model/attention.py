"""Which attention reads a sequence: SDPA or eager with a dense mask, or, where it is long, FlexAttention with
a block mask.

The mask alone decides: a model that is set to sdpa hands block masks to FlexAttention and all others to SDPA.
Nothing is switched on the model, so layers that the backward pass recomputes, decoding and other threads go
on as they are.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from parallelmind.layout import Batch
from parallelmind.model.patch import is_patched, sibling_penalty
from parallelmind.model.structure import causal_lm, text_modules

FLEX = "flex_attention"
BIAS = "sibling_bias"  # what a mask in blocks carries: it says by itself who sees whom, not how well

# Tokens: between two measured points. On an H200 FlexAttention is 0.72 times as fast as SDPA at 512 tokens
# and 2.34 times at 8,192. A constant, and no timing on the spot, because a run that is resumed must choose as
# it did before.
FLEX_ABOVE = 2048

_HEAD_DIMS = range(
    16, 129
)  # below, the kernel refuses; above, its tiles outgrow the shared memory of some cards
_SHARED_MEMORY = (
    160 * 1024
)  # bytes that its default tiles take: A100 and the H series have them, consumer cards do not

# New shapes, batches of one and passes without gradients are compiled apart. Past the compiler's limit a call
# would run uncompiled, and hold the score of every pair.
torch._dynamo.config.recompile_limit = 64


class AttentionBackend(BlockMask, ABC):
    """A mask that knows better how to read keys and values than any kernel: it attends by itself.

    A BlockMask by name only, which is what models hand to their attention as it is.
    """

    def __init__(self, queries: int) -> None:
        self._queries = queries

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, 1, self._queries, self._queries

    @abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`[1, tokens, heads, dim]` of queries `[1, heads, tokens, dim]`; key and value are what the cache
        has returned.
        """


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as layers of transformers call it: `[batch, heads, tokens, dim]` in, `[batch, tokens, heads,
    dim]` out.
    """
    if isinstance(attention_mask, AttentionBackend):
        scale = settings.get("scaling")
        return attention_mask.attend(
            query, key, value, query.shape[-1] ** -0.5 if scale is None else scale
        ), None
    if isinstance(attention_mask, BlockMask):
        query, key = query.to(value.dtype), key.to(value.dtype)  # autocast does so for SDPA alone
        return _attend_blocks(module, query, key, value, attention_mask, **settings)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


def _attend_in_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same for a model that is set to FlexAttention."""
    if isinstance(attention_mask, AttentionBackend):
        return _attend(module, query, key, value, attention_mask, **settings)
    return _attend_blocks(module, query, key, value, cast(BlockMask, attention_mask), **settings)


def _attend_blocks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """FlexAttention, with what the mask adds to the scores of those that it lets through, if anything."""
    if bias := getattr(mask, BIAS, None):
        settings["position_bias"] = bias
    return flex_attention_forward(module, query, key, value, mask, **settings)


AttentionInterface.register("sdpa", _attend)
AttentionInterface.register(FLEX, _attend_in_blocks)


def length_bucket(length: int) -> int:
    """The lengths that are treated alike: up to this power of two."""
    return 1 << max(length - 1, 0).bit_length()


def compute_dtype(model: PreTrainedModel | PeftModel) -> torch.dtype:
    """What the model computes in as things are: the type of its weights, or autocast's."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def choose_attention(model: nn.Module, length: int, dtype: torch.dtype) -> str:
    """What reads a whole sequence of this length: flex_attention, or what the model is set to. The same
    within a bucket.

    dtype: what the model computes in.
    """
    inner = causal_lm(model)
    own = str(inner.config._attn_implementation)
    # An unpatched model makes masks of its own; on eager, a model's attention does something that sdpa does
    # not; and not every compiler takes a penalty together with changing lengths.
    long = (
        own == "sdpa"
        and length_bucket(length) > FLEX_ABOVE
        and is_patched(inner)
        and not sibling_penalty(inner)
    )
    return FLEX if long and _fits_device(inner.device, dtype) and _fits_model(inner) else own


def _fits_device(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel is made for this card and type; in float32 it could not use tensor cores."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= _SHARED_MEMORY


def hands_over_masks(model: PreTrainedModel) -> bool:
    """Whether every layer hands mask, queries and keys as they are to the attention that the model is set to,
    sdpa or flex.
    """
    modules = text_modules(model).values()
    layers = [module for module in modules if isinstance(module, GradientCheckpointingLayer)]
    return (
        str(model.config._attn_implementation) in ("sdpa", FLEX)
        and all(module._supports_flex_attn for module in modules if isinstance(module, PreTrainedModel))
        and len(layers) > 0
        and all(_interface(layer) is ALL_ATTENTION_FUNCTIONS for layer in layers)
    )


def _fits_model(model: PreTrainedModel) -> bool:
    """Whether FlexAttention takes the shapes of every layer."""
    modules = text_modules(model).values()
    dims, dropouts = (
        _set_on(modules, "head_dim", "head_size", "qk_head_dim", "v_head_dim"),
        _set_on(modules, "attention_dropout"),
    )
    return hands_over_masks(model) and dims <= set(_HEAD_DIMS) and not any(dropouts)


def _set_on(modules: Iterable[nn.Module], *names: str) -> set[Any]:
    """The values of these attributes, on whichever modules have them."""
    return {getattr(module, name) for module in modules for name in names if hasattr(module, name)}


def _interface(layer: nn.Module) -> Any:
    """The table of attentions that the layer's source knows; one that keeps its own changes the mask before
    it attends.
    """
    sources = (sys.modules[kind.__module__] for kind in type(layer).__mro__)
    return next(
        (source.ALL_ATTENTION_FUNCTIONS for source in sources if hasattr(source, "ALL_ATTENTION_FUNCTIONS")),
        None,
    )


class AttentionLogger:
    """Says which attention reads the batches of each bucket of lengths. dtype: what the model computes in."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, say: Callable[[str], None]) -> None:
        self._model, self._dtype, self._say = model, dtype, say
        self._seen: set[int] = set()
        self._said: dict[str, int] = {}  # the longest bucket of each attention

    def __call__(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches; a line comes before the first of a bucket of which none has told yet."""
        for batch in batches:
            limit = length_bucket(batch.ids.shape[1])
            if limit not in self._seen:
                self._seen.add(limit)
                self._tell(limit)
            yield batch

    def _tell(self, limit: int) -> None:
        name = choose_attention(self._model, limit, self._dtype)
        if limit > self._said.get(name, 0):
            self._said[name] = limit
            self._say(f"attention: {name} for up to {limit} tokens")
