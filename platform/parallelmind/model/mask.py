"""Attention masks of a whole sequence, dense or as blocks, from the visibility rules of its tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from parallelmind.config import Visibility
from parallelmind.layout import PADDING
from parallelmind.model.attention import choose_attention, compute_dtype
from parallelmind.model.hf_compat import (
    FLEX,
    SCORE_BIAS,
    applies_sliding_window,
    attention_name,
    has_own_attention,
)
from parallelmind.model.patch import sibling_penalty
from parallelmind.model.structure import causal_lm, decoder
from parallelmind.visibility import RULES, AttentionWindow, is_sibling

BLOCK = 128  # tokens; the block size of FlexAttention
_SLICE = 4 * BLOCK  # queries whose pairs are computed together

Mask = Tensor | BlockMask


def layer_windows(model: PreTrainedModel | PeftModel) -> dict[str, AttentionWindow]:
    """The attention window of every layer type of a model."""
    config = model.config.get_text_config(decoder=True)
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    windowed_types = {
        "sliding_attention": AttentionWindow(window=window),
        "chunked_attention": AttentionWindow(chunk=chunk),
    }
    types = getattr(config, "layer_types", None)
    if types is None:
        is_sliding = window and applies_sliding_window(decoder(causal_lm(model)))
        types = ["sliding_attention" if is_sliding else "chunked_attention" if chunk else "full_attention"]
    return {
        layer_type: windowed_types.get(layer_type, AttentionWindow()) for layer_type in dict.fromkeys(types)
    }


def attention_masks(
    model: PreTrainedModel | PeftModel,
    time: Tensor,
    sequence: Tensor,
    visibility: Visibility,
    queries: int | None = None,
) -> Mask | dict[str, Mask]:
    """The masks of a call in the form that the model takes.

    Arguments are those of `visibility_mask`. Returns one mask where all layers have the same window, else a
    mask for each layer type. Masks are dense, or block masks for a whole sequence that FlexAttention reads.
    Raises ValueError for an attention implementation that takes no such mask.
    """
    configured = attention_name(model)
    windows, penalty = layer_windows(model), sibling_penalty(model)
    is_whole = queries is None
    chosen = choose_attention(model, time.shape[-1], compute_dtype(model)) if is_whole else configured
    masks: dict[AttentionWindow, Mask] = {}
    if chosen == FLEX:
        if penalty and not has_own_attention(model):
            raise ValueError(
                "attn_implementation='flex_attention': sibling_penalty needs sdpa or eager in this model"
            )
        for window in set(windows.values()):
            masks[window] = mask = block_mask(time, sequence, visibility, window, queries)
            if penalty:
                first = 0 if queries is None else time.shape[-1] - queries
                setattr(mask, SCORE_BIAS, SiblingBias(sequence[:, first:], sequence, penalty))
    else:
        masks.update(_dense_masks(model, time, sequence, visibility, queries))
    if len(masks) == 1:
        return masks.popitem()[1]
    return {layer_type: masks[window] for layer_type, window in windows.items()}


def _dense_masks(
    model: PreTrainedModel | PeftModel,
    time: Tensor,
    sequence: Tensor,
    visibility: Visibility,
    queries: int | None,
) -> dict[AttentionWindow, Tensor]:
    windows, penalty = set(layer_windows(model).values()), sibling_penalty(model)
    visible = visibility_mask(time, sequence, visibility, queries)  # [batch, 1, queries, keys]
    first = time.shape[-1] - visible.shape[-2]
    q_time, k_time = time[:, None, first:, None], time[:, None, None, :]
    siblings = is_sibling(sequence[:, None, first:, None], sequence[:, None, None, :]) if penalty else None
    masks = {}
    for window in windows:
        within = window.within(q_time, k_time)
        masks[window] = dense_attention_mask(
            visible if within is None else visible & within,
            attention_name(model),
            model.dtype,
            penalty,
            siblings,
        )
    return masks


class SiblingBias:
    """The sibling penalty as FlexAttention's position bias, computed per score instead of stored."""

    def __init__(self, q_sequence: Tensor, k_sequence: Tensor, penalty: float) -> None:
        self._q_sequence, self._k_sequence, self._penalty = q_sequence, k_sequence, penalty

    def __getitem__(self, index: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        batch, _, query, key = index
        return -self._penalty * is_sibling(self._q_sequence[batch, query], self._k_sequence[batch, key])


def visibility_mask(
    time: Tensor, sequence: Tensor, visibility: Visibility, queries: int | None = None
) -> Tensor:
    """Bool `[batch, 1, queries, keys]`: which keys each query sees.

    time, sequence: `[batch, keys]` integers; sequence is -1 for padding. The queries are the last `queries`
    keys, by default all of them. Every token sees itself, so no row is empty; nothing else sees padding.
    """
    keys = time.shape[-1]
    first = keys - (keys if queries is None else queries)
    q_time, q_sequence = time[:, first:, None], sequence[:, first:, None]
    visible = _sees_others(visibility, q_time, q_sequence, time[:, None, :], sequence[:, None, :])
    visible.diagonal(offset=first, dim1=-2, dim2=-1).fill_(True)
    return visible[:, None]


def _sees_others(
    visibility: Visibility, q_time: Tensor, q_sequence: Tensor, k_time: Tensor, k_sequence: Tensor
) -> Tensor:
    """The visibility rule, with padding excluded on both sides."""
    visible: Tensor = RULES[visibility](q_time, q_sequence, k_time, k_sequence)
    return visible & (k_sequence != PADDING) & (q_sequence != PADDING)


def block_mask(
    time: Tensor,
    sequence: Tensor,
    visibility: Visibility,
    window: AttentionWindow,
    queries: int | None = None,
) -> BlockMask:
    """The mask for FlexAttention: which blocks of tokens hold visible pairs, and the rule within a block.

    Other arguments are those of `visibility_mask`. Pairs are computed in slices of queries, so no `[queries,
    keys]` tensor ever exists.
    """
    time, sequence = time.int(), sequence.int()  # the kernel reads them for every pair, in every layer
    index = torch.arange(time.shape[1], device=time.device)
    first = 0 if queries is None else len(index) - queries
    q_time, q_sequence, q_index = time[:, first:], sequence[:, first:], index[first:]

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        times = q_time[batch, query], time[batch, key]
        visible = _sees_others(visibility, times[0], q_sequence[batch, query], times[1], sequence[batch, key])
        visible = visible | (q_index[query] == key)
        within = window.within(*times)
        return visible if within is None else visible & within

    batch = torch.arange(len(time), device=time.device)[:, None, None]
    slices = index[: len(q_index)].split(_SLICE)
    counts = [_pairs_per_block(mask_mod(batch, batch, queries[:, None], index)) for queries in slices]
    pairs = torch.cat(counts, dim=1)[:, None]  # [batch, 1, query blocks, key blocks]
    full = pairs == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_block_list((pairs > 0) & ~full),
        *_block_list(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(len(q_index), len(index)),
    )


def _pairs_per_block(visible: Tensor) -> Tensor:
    """`[batch, query blocks, key blocks]` visible pairs of bool `[batch, queries, keys]`."""
    padded = F.pad(visible, (0, -visible.shape[2] % BLOCK, 0, -visible.shape[1] % BLOCK))
    return padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).sum((2, 4))


def _block_list(selected: Tensor) -> tuple[Tensor, Tensor]:
    """Selected key blocks in each row, and the indices of all blocks, selected ones first; int32."""
    indices = selected.byte().argsort(dim=-1, descending=True, stable=True)
    return selected.sum(-1, dtype=torch.int32), indices.int()


def dense_attention_mask(
    visible: Tensor,
    implementation: str,
    dtype: torch.dtype,
    penalty: float = 0.0,
    siblings: Tensor | None = None,
) -> Tensor:
    """A bool mask in the form that the attention implementation takes, made once for all layers.

    siblings: bool in the shape of `visible`, where `penalty` is subtracted from the score; None: nowhere.
    sdpa takes bool, but on a CPU its kernel converts it in every layer and keeps each copy for the backward
    pass. eager ignores bool silently. Raises ValueError for any other implementation.
    """
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation={implementation!r}: branch masks need sdpa or eager")
    if implementation == "sdpa" and visible.device.type != "cpu" and siblings is None:
        return visible
    scores = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    if siblings is not None:
        scores.masked_fill_(siblings, -penalty)
    return scores.masked_fill_(~visible, torch.finfo(dtype).min)
