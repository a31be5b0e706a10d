"""Attention masks of whole sequences, dense or as blocks, from the relations of their tokens' segments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from parallelmind.config import Visibility
from parallelmind.model.attention import BLOCKS, choose_attention, compute_dtype
from parallelmind.model.block_attention import QUERIES, BlockAttention
from parallelmind.model.hf_compat import (
    FLEX,
    SCORE_BIAS,
    applies_sliding_window,
    attention_name,
    has_own_attention,
)
from parallelmind.model.patch_state import is_patched, rope_config, sibling_penalty
from parallelmind.model.penalty_attention import BlockPenaltyMask, DensePenaltyMask
from parallelmind.model.structure import causal_lm, decoder
from parallelmind.tree import SIBLING
from parallelmind.visibility import AttentionWindow, learns_penalty, relation_scores

BLOCK = 128  # tokens; the block size of FlexAttention
_SLICE = 4 * BLOCK  # queries whose pairs are computed together

Mask = Tensor | BlockMask


@dataclass(frozen=True, slots=True)
class Placement:
    """What visibility depends on.

    time, segment: `[rows, tokens]` int64; segment is -1 for padding. relations: `[rows, segments + 1,
    segments + 1]` int8, as in `layout.Batch`.
    """

    time: Tensor
    segment: Tensor
    relations: Tensor

    @property
    def tokens(self) -> int:
        return self.time.shape[-1]


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
    model: PreTrainedModel | PeftModel, placement: Placement, visibility: Visibility, is_flat: bool = False
) -> Mask | dict[str, Mask]:
    """The masks of a call in the form that the model takes.

    is_flat: whether every row is one sample of main and branches alone. Returns one mask where all layers
    have the same window, else a mask for each layer type. Raises ValueError for an attention implementation
    that takes no such mask.
    """
    windows = layer_windows(model)
    chosen = choose_attention(model, placement.tokens, compute_dtype(model), is_flat)
    masks = {window: _mask(model, chosen, placement, visibility, window) for window in set(windows.values())}
    if len(masks) == 1:
        return masks.popitem()[1]
    return {layer_type: masks[window] for layer_type, window in windows.items()}


def _mask(
    model: PreTrainedModel | PeftModel,
    chosen: str,
    placement: Placement,
    visibility: Visibility,
    window: AttentionWindow,
) -> Mask:
    """The mask of the layers with this window, for the chosen attention."""
    if visibility == "columnar" and is_patched(model) and learns_penalty(rope_config(model)):
        return _penalty_mask(model, chosen, placement, window)
    penalty = sibling_penalty(model)
    if chosen == FLEX:
        if penalty and not has_own_attention(model):
            raise ValueError(
                "attn_implementation='flex_attention': sibling_penalty needs sdpa or eager in this model"
            )
        mask = block_mask(placement, visibility, window)
        if penalty:
            setattr(mask, SCORE_BIAS, ScoreBias(placement, visibility, penalty))
        return mask
    bias = AttentionBias(placement, visibility, penalty, window, model.dtype)
    if chosen == BLOCKS:
        return BlockAttention([bias.blocks(row, QUERIES) for row in range(len(placement.time))])
    return dense_attention_mask(bias.whole(), attention_name(model), has_penalty=penalty > 0)


def _penalty_mask(
    model: PreTrainedModel | PeftModel, chosen: str, placement: Placement, window: AttentionWindow
) -> Mask:
    """The same where each layer subtracts a penalty of its own."""
    if chosen == FLEX:
        raise ValueError("attn_implementation='flex_attention': sibling_penalty=learned needs sdpa or eager")
    own = AttentionBias(placement, "isolated", window=window, dtype=model.dtype)
    siblings = SiblingBias(placement, window, model.dtype)
    if chosen == BLOCKS:
        rows = range(len(placement.time))
        return BlockPenaltyMask([(own.blocks(row, QUERIES), siblings.blocks(row, QUERIES)) for row in rows])
    return DensePenaltyMask(own.whole(), siblings.whole())


class AttentionBias:
    """The summand of attention scores, in `dtype`: minus infinity where the query does not see the key."""

    def __init__(
        self,
        placement: Placement,
        visibility: Visibility,
        penalty: float = 0.0,
        window: AttentionWindow | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._placement, self._window = placement, window or AttentionWindow()
        self._scores = score_tables(placement, visibility, penalty).to(dtype)

    def whole(self) -> Tensor:
        """`[rows, 1, tokens, tokens]`."""
        rows, tokens = self._placement.time.shape
        bias = self._scores.new_empty(rows, 1, tokens, tokens)
        for row in range(rows):
            self._write(bias[row, 0], row, first=0)
        return bias

    def blocks(self, row: int, queries: int) -> Iterator[Tensor]:
        """`[queries, tokens]` of every block of queries of a row; the last may be shorter."""
        tokens = self._placement.tokens
        for first in range(0, tokens, queries):
            bias = self._scores.new_empty(min(queries, tokens - first), tokens)
            self._write(bias, row, first)
            yield bias

    def _write(self, bias: Tensor, row: int, first: int) -> None:
        """Fill `[queries, tokens]` of the queries from `first` on. Every token sees itself."""
        time, scores = self._placement.time[row], self._scores[row]
        segment = self._placement.segment[row] % len(scores)  # -1 is the last segment
        queries = slice(first, first + len(bias))
        torch.index_select(scores[:, segment], 0, segment[queries], out=bias)
        # Infinity for an earlier key, minus infinity for any other: faster than a comparison and a fill.
        earlier = time[queries, None].float() - 0.5 - time.float()
        bias.clamp_(max=earlier.mul_(torch.inf))
        within = self._window.within(time[queries, None], time)
        if within is not None:
            bias.masked_fill_(~within, -torch.inf)
        bias.diagonal(offset=first).fill_(0)


class SiblingBias(AttentionBias):
    """The same with siblings alone: 0 for keys of siblings, where visibility is columnar."""

    def __init__(self, placement: Placement, window: AttentionWindow, dtype: torch.dtype) -> None:
        super().__init__(placement, "isolated", window=window, dtype=dtype)
        is_sibling = placement.relations == SIBLING
        self._scores = torch.full_like(self._scores, -torch.inf).masked_fill_(is_sibling, 0)

    def _write(self, bias: Tensor, row: int, first: int) -> None:
        super()._write(bias, row, first)
        bias.diagonal(offset=first).fill_(-torch.inf)


def score_tables(placement: Placement, visibility: Visibility, penalty: float = 0.0) -> Tensor:
    """Float32 `[rows, segments + 1, segments + 1]` summand of the scores for every pair of segments."""
    relations = placement.relations
    scores = torch.zeros(relations.shape, device=relations.device)
    for relation, score in enumerate(relation_scores(visibility, penalty).tolist()):  # copies nothing there
        scores.masked_fill_(relations == relation, score)
    return scores


class ScoreBias:
    """The sibling penalty as FlexAttention's position bias, computed per score instead of stored."""

    def __init__(self, placement: Placement, visibility: Visibility, penalty: float) -> None:
        self._segment = placement.segment.int()
        # The mask leaves out what is not visible; minus infinity as a summand would be computed with.
        self._scores = score_tables(placement, visibility, penalty).clamp(min=-penalty)

    def __getitem__(self, index: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        row, _, query, key = index
        return self._scores[row, self._segment[row, query], self._segment[row, key]]


def block_mask(placement: Placement, visibility: Visibility, window: AttentionWindow) -> BlockMask:
    """The mask for FlexAttention: which blocks of tokens hold visible pairs, and the rule within a block.

    Pairs are computed in slices of queries, so no `[tokens, tokens]` tensor ever exists.
    """
    # The kernel reads these for every pair, in every layer.
    time, segment = placement.time.int(), placement.segment.int()
    is_visible = score_tables(placement, visibility) == 0

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        q_time, k_time = time[row, query], time[row, key]
        visible = (k_time < q_time) & is_visible[row, segment[row, query], segment[row, key]]
        visible = visible | (query == key)
        within = window.within(q_time, k_time)
        return visible if within is None else visible & within

    row = torch.arange(len(time), device=time.device)[:, None, None]
    index = torch.arange(placement.tokens, device=time.device)
    slices = index[:, None].split(_SLICE)
    counts = [_pairs_per_block(mask_mod(row, row, queries, index)) for queries in slices]
    pairs = torch.cat(counts, dim=1)[:, None]  # [rows, 1, query blocks, key blocks]
    full = pairs == BLOCK * BLOCK
    return BlockMask.from_kv_blocks(
        *_block_list((pairs > 0) & ~full),
        *_block_list(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(placement.tokens, placement.tokens),
    )


def _pairs_per_block(visible: Tensor) -> Tensor:
    """`[batch, query blocks, key blocks]` visible pairs of bool `[batch, queries, keys]`."""
    padded = F.pad(visible, (0, -visible.shape[2] % BLOCK, 0, -visible.shape[1] % BLOCK))
    return padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).sum((2, 4))


def _block_list(selected: Tensor) -> tuple[Tensor, Tensor]:
    """Selected key blocks in each row, and the indices of all blocks, selected ones first; int32."""
    indices = selected.byte().argsort(dim=-1, descending=True, stable=True)
    return selected.sum(-1, dtype=torch.int32), indices.int()


def dense_attention_mask(bias: Tensor, implementation: str, has_penalty: bool = False) -> Tensor:
    """A dense mask in the form that the attention implementation takes, made once for all layers.

    bias: summand of the scores, minus infinity where a key is not visible; it is written to. has_penalty:
    whether it may have other values than 0 and minus infinity. sdpa takes bool, but on a CPU its kernel
    converts it in every layer and keeps each copy for the backward pass. eager ignores bool silently. Raises
    ValueError for any other implementation.
    """
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation={implementation!r}: branch masks need sdpa or eager")
    if implementation == "sdpa" and bias.device.type != "cpu" and not has_penalty:
        return bias == 0
    return bias.clamp_(min=torch.finfo(bias.dtype).min)
