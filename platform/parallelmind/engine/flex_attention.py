"""Attention of a step's tokens by FlexAttention, straight from the paged KV cache of an accelerator.

The batch of the kernel are tiles: tokens that read one block table. The kernel visits the physical blocks of
that table alone. Which of their keys a token sees is computed for every pair from arrays on the device; no
mask of pairs exists. What a token has from several tables is merged by the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.step_buffers import StepBuffers
from parallelmind.engine.tiles import TILE
from parallelmind.visibility import AttentionWindow

_QUERY_BLOCK = 4096  # queries of a block of the mask: more than a tile has, times the heads that share a key
_VARIANTS = 1024  # sizes and kinds of layers that are compiled; torch's own limit is 8


class SlotMetadata:
    """Time coordinate and segment number of the token in each cache slot, on the device.

    time, segment: `[slots]` int32, as in `BlockTables`.
    """

    def __init__(self, time: Tensor, segment: Tensor) -> None:
        self.time, self.segment = time, segment

    def place(self, slots: Tensor, time: Tensor, segment: Tensor) -> None:
        """Note which tokens a step writes to these slots."""
        self.time.index_copy_(0, slots, time)
        self.segment.index_copy_(0, slots, segment)


class FlexAttention:
    """Attention of the tokens of one step."""

    def __init__(self, buffers: StepBuffers, slots: SlotMetadata) -> None:
        """buffers: hold the step. slots: hold the tokens of earlier steps, and get those of this one."""
        _, _, time, _, own_slots = buffers.columns
        time = time.int()
        slots.place(own_slots, time, buffers.segment)
        self._buffers, self._slots = buffers, slots
        self._time, self._segment, self._own_slots = (
            column[buffers.queries] for column in (time, buffers.segment, own_slots.int())
        )  # [tiles, TILE]
        num_blocks = len(slots.time) // BLOCK
        filled = buffers.filled.new_zeros(len(buffers.filled), num_blocks)
        self._filled = filled.scatter_(1, buffers.blocks.long(), buffers.filled)
        self._masks: dict[AttentionWindow, BlockMask] = {}

    def attend(
        self,
        query: Tensor,
        pools: tuple[Tensor, Tensor],
        window: AttentionWindow,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """`[1, tokens, heads, dim]` of queries `[1, heads, tokens, dim]`.

        pools: keys and values `[slots, heads, dim]`, those of the step's tokens included. softcap, sinks: as
        in `hf_compat.AttentionBackend.attend`.
        """
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        keys, values = (pool.transpose(0, 1)[None] for pool in pools)
        arguments = query, keys, values, self._buffers.queries, self._buffers.parts
        limits: Any = {"recompile_limit": _VARIANTS, "accumulated_recompile_limit": _VARIANTS}
        with torch._dynamo.config.patch(**limits):
            attended: Tensor = _compiled_attend(
                *arguments, self._masks[window], self._score_mod(softcap), scale, sinks
            )
            return attended

    def _mask(self, window: AttentionWindow) -> BlockMask:
        """The mask of the layers with this window, over tiles and physical blocks."""
        filled, time, own_slots, slot_time = self._filled, self._time, self._own_slots, self._slots.time
        score_of = self._score_of()

        def mask_mod(tile: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            q_time, k_time = time[tile, query], slot_time[key]
            visible = (k_time < q_time) | (key == own_slots[tile, query])
            visible = visible & (key % BLOCK < filled[tile, key // BLOCK])
            within = window.within(q_time, k_time)
            visible = visible if within is None else visible & within
            return visible if score_of is None else visible & (score_of(tile, query, key) > -torch.inf)

        return BlockMask.from_kv_blocks(
            self._buffers.num_blocks[:, None, None],
            self._buffers.blocks[:, None, None],
            BLOCK_SIZE=(_QUERY_BLOCK, BLOCK),
            mask_mod=mask_mod,
            seq_lengths=(TILE, len(slot_time)),
            compute_q_blocks=False,
        )

    def _score_mod(self, softcap: float | None) -> Callable[..., Tensor] | None:
        """What becomes of the score of a visible pair; None if it stays."""
        score_of = self._score_of()
        if softcap is None and score_of is None:
            return None

        def score_mod(score: Tensor, tile: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            score = score if softcap is None else softcap * torch.tanh(score / softcap)
            return score if score_of is None else score + score_of(tile, query, key)

        return score_mod

    def _score_of(self) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """The summand of a pair's score by the segments of both; None if it is zero for all pairs."""
        buffers = self._buffers
        if not buffers.bucket.scores:
            return None
        scores, start, width = buffers.scores, buffers.score_start, buffers.score_width
        filled, segment, slot_segment = self._filled, self._segment, self._slots.segment

        def score_of(tile: Tensor, query: Tensor, key: Tensor) -> Tensor:
            index = segment[tile, query] * width[tile] + slot_segment[key]
            # A slot without a token of the tile may name a segment that the table of scores does not have.
            is_key = (key % BLOCK < filled[tile, key // BLOCK]) & (width[tile] > 0)
            return scores[start[tile] + torch.where(is_key, index, 0)]

        return score_of


def is_chosen(device: torch.device) -> bool:
    """Whether decoding on this device uses FlexAttention where the model allows it."""
    return device.type == "cuda"


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    parts: Tensor,
    mask: BlockMask,
    score_mod: Callable[..., Tensor] | None,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """`[1, tokens, heads, dim]` of queries `[1, heads, tokens, dim]`.

    keys, values: `[1, heads, slots, dim]`. queries, parts: as in `StepBuffers`.
    """
    tiles = query[0].transpose(0, 1)[queries].transpose(1, 2)  # [tiles, heads, TILE, dim]
    group = query.shape[1] // keys.shape[1]
    settings: dict[str, Any] = {
        "score_mod": score_mod,
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": group > 1,
        "kernel_options": _kernel_options(group),
    }
    if parts.shape[1] == 1 and sinks is None:
        out: Any = flex_attention(tiles, keys, values, **settings)
        attended: Tensor = out.transpose(1, 2).flatten(0, 1)[parts[:, 0]][None]
        return attended
    both: Any = flex_attention(tiles, keys, values, **settings, return_aux=AuxRequest(lse=True))
    return _merged(both[0], both[1].lse, parts, sinks)[None]


_compiled_attend = torch.compile(attend, fullgraph=True, dynamic=False)


def _merged(out: Tensor, lse: Tensor, parts: Tensor, sinks: Tensor | None) -> Tensor:
    """`[tokens, heads, dim]` attention over the keys of all parts of each token; summed in float32.

    out: `[tiles, heads, TILE, dim]`. lse: `[tiles, heads, TILE]`; minus infinity where there is no key.
    """
    rows = out.transpose(1, 2).flatten(0, 1)[parts].float()  # [tokens, parts, heads, dim]
    sums = lse.transpose(1, 2).flatten(0, 1)[parts][..., None]
    total = sums.logsumexp(dim=1, keepdim=True).clamp(min=torch.finfo(sums.dtype).min)
    merged = (rows * (sums - total).exp()).sum(dim=1)
    if sinks is not None:  # the share of the keys beside the sink, whose value is zero
        merged = merged * (total[:, 0] - sinks.float()[:, None]).sigmoid()
    return merged.to(out.dtype)


def _kernel_options(group: int) -> dict[str, Any]:
    """Sizes of the kernel's tiles, which divide the mask's blocks. group: query heads that share a key.

    Where `group` is a power of two, the kernel multiplies a key with all of these heads at once, and chooses
    the number of rows itself.
    """
    options = {"BLOCK_N": BLOCK}
    return options if group & (group - 1) == 0 else {**options, "BLOCK_M": TILE}


def without_nan(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values to write to the cache: a token whose value is not finite gets a value of 0.

    Its key becomes NaN, so that queries that see it get NaN. The kernel multiplies values of keys that it
    masks with 0, which would turn a NaN in an unused slot into one of the token that reads the block.
    """
    is_finite = value.isfinite().all(dim=-1, keepdim=True)
    return key.where(is_finite, torch.nan), value.where(is_finite, 0)
