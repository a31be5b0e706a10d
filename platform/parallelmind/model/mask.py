"""Masks of a whole sequence: what the rules of visibility let its tokens see, dense or in blocks."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from parallelmind.config import Visibility
from parallelmind.layout import PADDING
from parallelmind.model.attention import BIAS, FLEX, choose_attention, compute_dtype
from parallelmind.model.patch import sibling_penalty
from parallelmind.model.structure import causal_lm, decoder
from parallelmind.visibility import RULES, AttentionWindow, is_sibling

BLOCK = 128  # tokens; the block of FlexAttention
_SLICE = 4 * BLOCK  # queries whose pairs are looked at together

_WINDOWED = "create_sliding_window_causal_mask"  # what a module of transformers imports for its windows

Mask = Tensor | BlockMask


def layer_windows(model: PreTrainedModel | PeftModel) -> dict[str, AttentionWindow]:
    """The reach of every layer type of a model."""
    config = model.config.get_text_config(decoder=True)
    window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    known = {
        "sliding_attention": AttentionWindow(window=window),
        "chunked_attention": AttentionWindow(chunk=chunk),
    }
    types = getattr(config, "layer_types", None)
    if types is None:
        # Some configurations carry a window that the model, asking for full masks only, never applies.
        inner = decoder(causal_lm(model))
        window = window if hasattr(sys.modules[type(inner).__module__], _WINDOWED) else None
        types = ["sliding_attention" if window else "chunked_attention" if chunk else "full_attention"]
    return {kind: known.get(kind, AttentionWindow()) for kind in dict.fromkeys(types)}


def attention_masks(
    model: PreTrainedModel | PeftModel,
    time: Tensor,
    sequence: Tensor,
    visibility: Visibility,
    queries: int | None = None,
) -> Mask | dict[str, Mask]:
    """The masks of a call as the model takes them: one where its layers reach equally far, else one per layer
    type.

    Arguments are those of `visibility_mask`. Dense, or for a whole sequence that FlexAttention reads, in blocks.
    Raises ValueError for an attention implementation that takes no such mask.
    """
    keys, own = time.shape[-1], str(model.config._attn_implementation)
    reader = choose_attention(model, keys, compute_dtype(model)) if queries is None else own
    reaches, penalty = layer_windows(model), sibling_penalty(model)
    masks: dict[AttentionWindow, Mask]
    if reader == FLEX:
        masks = {
            reach: block_mask(time, sequence, visibility, reach, queries) for reach in set(reaches.values())
        }
        for mask in masks.values() if penalty else ():
            setattr(mask, BIAS, SiblingBias(sequence[:, -(queries or keys) :], sequence, penalty))
    else:
        seen = visibility_mask(time, sequence, visibility, queries)
        q_time, k_time = time[:, None, keys - seen.shape[-2] :, None], time[:, None, None, :]
        near = {reach: reach.within(q_time, k_time) for reach in reaches.values()}
        away = (
            is_sibling(sequence[:, None, keys - seen.shape[-2] :, None], sequence[:, None, None, :])
            if penalty
            else None
        )
        masks = {
            reach: dense_attention_mask(
                seen if part is None else seen & part, own, model.dtype, penalty, away
            )
            for reach, part in near.items()
        }
    if len(masks) == 1:
        return masks.popitem()[1]
    return {kind: masks[reach] for kind, reach in reaches.items()}


class SiblingBias:
    """What FlexAttention adds to a score, where transformers reads it from a table: computed, so that no
    table exists.
    """

    def __init__(self, q_sequence: Tensor, k_sequence: Tensor, penalty: float) -> None:
        self._q_sequence, self._k_sequence, self._penalty = q_sequence, k_sequence, penalty

    def __getitem__(self, place: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        batch, _, query, key = place
        return -self._penalty * is_sibling(self._q_sequence[batch, query], self._k_sequence[batch, key])


def visibility_mask(
    time: Tensor, sequence: Tensor, visibility: Visibility, queries: int | None = None
) -> Tensor:
    """Which key every query sees.

    time, sequence: `[batch, keys]` integers, sequence -1 where there is only padding. The queries are the
    last `queries` keys (all of them by default). Returns bool `[batch, 1, queries, keys]`; every token sees
    itself, so no row is empty, and padding is seen by nothing else.
    """
    keys = time.shape[-1]
    first = keys - (keys if queries is None else queries)
    q_time, q_sequence = time[:, first:, None], sequence[:, first:, None]
    seen = _others(visibility, q_time, q_sequence, time[:, None, :], sequence[:, None, :])
    seen.diagonal(offset=first, dim1=-2, dim2=-1).fill_(True)
    return seen[:, None]


def _others(
    visibility: Visibility, q_time: Tensor, q_sequence: Tensor, k_time: Tensor, k_sequence: Tensor
) -> Tensor:
    """What real tokens see of other real tokens."""
    seen: Tensor = RULES[visibility](q_time, q_sequence, k_time, k_sequence)
    return seen & (k_sequence != PADDING) & (q_sequence != PADDING)


def block_mask(
    time: Tensor, sequence: Tensor, visibility: Visibility, reach: AttentionWindow, queries: int | None = None
) -> BlockMask:
    """The mask as FlexAttention takes it: which blocks of tokens hold visible pairs, and the rule within a
    block.

    Arguments are those of `visibility_mask`. Pairs are looked at in slices: no `[queries, keys]` tensor ever exists.
    """
    time, sequence = time.int(), sequence.int()  # the kernel reads them for every pair, in every layer
    place = torch.arange(time.shape[1], device=time.device)
    first = 0 if queries is None else len(place) - queries
    q_time, q_sequence, q_place = time[:, first:], sequence[:, first:], place[first:]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        times = q_time[batch, query], time[batch, key]
        seen = _others(visibility, times[0], q_sequence[batch, query], times[1], sequence[batch, key])
        seen = seen | (q_place[query] == key)
        near = reach.within(*times)
        return seen if near is None else seen & near

    batch = torch.arange(len(time), device=time.device)[:, None, None]
    rows = place[: len(q_place)].split(_SLICE)
    pairs = torch.cat([_pairs(sees(batch, batch, query[:, None], place)) for query in rows], dim=1)[:, None]
    full = pairs == BLOCK * BLOCK
    listed = (*_listed((pairs > 0) & ~full), *_listed(full))
    return BlockMask.from_kv_blocks(
        *listed, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(len(q_place), len(place))
    )


def _pairs(seen: Tensor) -> Tensor:
    """`[batch, blocks, blocks]`: how many pairs are visible in each block of bool `[batch, queries,
    keys]`.
    """
    padded = F.pad(seen, (0, -seen.shape[2] % BLOCK, 0, -seen.shape[1] % BLOCK))
    return padded.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).sum((2, 4))


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks are chosen in each row, and the numbers of all, chosen ones first; int32."""
    return chosen.sum(-1, dtype=torch.int32), chosen.byte().argsort(
        dim=-1, descending=True, stable=True
    ).int()


def dense_attention_mask(
    seen: Tensor, implementation: str, dtype: torch.dtype, penalty: float = 0.0, away: Tensor | None = None
) -> Tensor:
    """The mask in the form that the model's attention takes, made once for all layers.

    away: where `penalty` is taken off the score, bool in the shape of `seen`; None: nowhere. sdpa takes bool;
    on a CPU its kernel turns bool into additive floats again in every layer, and keeps each of them for the
    backward pass. eager silently ignores bool. Raises ValueError for any other kind.
    """
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation={implementation!r}: branch masks need sdpa or eager")
    if implementation == "sdpa" and seen.device.type != "cpu" and away is None:
        return seen
    added = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    if away is not None:
        added.masked_fill_(away, -penalty)
    return added.masked_fill_(~seen, torch.finfo(dtype).min)
