"""What a forward pass on an accelerator reads, in buffers that keep their addresses and shapes.

The numbers of a step are written to one host buffer and sent in one copy. Sizes come from a short list, so
that kernels are compiled, and steps captured, once for each size.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from operator import ge
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallelmind.engine.batch import PADDING, ModelInput
from parallelmind.engine.tiles import NO_PART, TILE, Tiles
from parallelmind.model.attention import length_bucket

_ALIGNMENT = 16  # bytes
_MIN_TOKENS, _MIN_TILES, _MIN_WIDTH, _MIN_SCORES = 4, 8, 64, 1024
_DTYPES: dict[torch.dtype, Any] = {
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int8: np.int8,
    torch.float32: np.float32,
}


class Bucket(NamedTuple):
    """Sizes of the buffers of a step.

    Each size grows fourfold, so that there are few of them. A step that is limited by the weights that it
    reads takes no longer with more rows.

    tokens, sampled: tokens, and those whose logits are needed. tiles: the last one is for padding.
    width: blocks of a table. parts: tiles that a token is in, which grow twofold. scores: numbers in score
    tables; 0 where no token needs one.
    """

    tokens: int
    sampled: int
    tiles: int
    width: int
    parts: int
    scores: int

    @staticmethod
    def of(inputs: ModelInput, tiles: Tiles) -> Bucket:
        """The smallest bucket that holds a step."""
        num_scores = sum(table.size for table in inputs.spans.scores)
        return Bucket(
            tokens=_fourfold(_MIN_TOKENS, len(inputs.ids)),
            sampled=_fourfold(_MIN_TOKENS, len(inputs.logits_indices)),
            tiles=_fourfold(_MIN_TILES, len(tiles.span)) + 1,
            width=_fourfold(_MIN_WIDTH, tiles.blocks.shape[1]),
            parts=length_bucket(tiles.parts.shape[1]),
            scores=_fourfold(_MIN_SCORES, 1 + num_scores) if num_scores else 0,
        )

    def holds(self, other: Bucket) -> bool:
        """Whether the kernels of this size compute a step of the other one, with as many tokens."""
        is_same_kind = self.tokens == other.tokens and bool(self.scores) == bool(other.scores)
        return is_same_kind and all(map(ge, self.kernel_size(), other.kernel_size()))

    def kernel_size(self) -> tuple[int, ...]:
        """The sizes for which kernels are compiled."""
        return self.tokens, self.tiles, self.width, self.parts, self.scores

    @property
    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every buffer."""
        tokens, sampled, tiles, width, parts, scores = self
        return {
            "columns": ((5, tokens), torch.int64),
            "sampled": ((sampled,), torch.int64),
            "queries": ((tiles, TILE), torch.int64),
            "parts": ((tokens, parts), torch.int64),
            "segment": ((tokens,), torch.int32),
            "adapter": ((tokens,), torch.int64),
            "num_blocks": ((tiles,), torch.int32),
            "blocks": ((tiles, width), torch.int32),
            "score_start": ((tiles,), torch.int32),
            "score_width": ((tiles,), torch.int32),
            "scores": ((scores,), torch.float32),
            "filled": ((tiles, width), torch.int8),
        }


class StepBuffers:
    """The buffers of one bucket.

    columns: `[5, tokens]` int64 ids, branch and time coordinates, positions and cache slots.
    sampled: `[sampled]` int64 tokens whose logits are needed. segment: `[tokens]` int32.
    adapter: `[tokens]` int64 numbers of adapters, as in `DeviceLora.numbered`.
    queries, num_blocks, blocks, filled: as in `Tiles`. parts: the same, where padding is a row of the last
        tile, which has no keys.
    scores: all score tables, one after another, behind a zero. score_start, score_width: `[tiles]` the first
        number of the tile's table and its width; 0 for a tile of which every key is visible.
    """

    columns: Tensor
    sampled: Tensor
    queries: Tensor
    parts: Tensor
    segment: Tensor
    adapter: Tensor
    num_blocks: Tensor
    blocks: Tensor
    score_start: Tensor
    score_width: Tensor
    scores: Tensor
    filled: Tensor

    def __init__(self, bucket: Bucket, device: torch.device, scratch_slot: int, scratch_block: int) -> None:
        """scratch_slot, scratch_block: cache slot and block of padding, which no token reads."""
        self.bucket, self._scratch_slot, self._scratch_block = bucket, scratch_slot, scratch_block
        layout, size = _layout(bucket.fields)
        self._is_cuda = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=self._is_cuda)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._sent: Any = torch.cuda.Event() if self._is_cuda else None
        bytes = self._host.numpy()
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, (part, shape, dtype) in layout.items():
            setattr(self, name, self._device[part].view(dtype).view(shape))
            self._arrays[name] = bytes[part].view(_DTYPES[dtype]).reshape(shape)

    def send(self, inputs: ModelInput, tiles: Tiles) -> None:
        """Fill the buffers, in one copy to the device. inputs: padded to the sizes of the bucket."""
        if self._sent is not None:
            self._sent.synchronize()  # the copy of the step before may still read the host buffer
        self._write_tokens(inputs)
        self._write_tiles(tiles)
        self._write_scores(inputs, tiles)
        self._device.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()

    def _write_tokens(self, inputs: ModelInput) -> None:
        arrays = self._arrays
        slots = np.where(inputs.slots == PADDING, self._scratch_slot, inputs.slots)
        for column, values in zip(
            arrays["columns"], (inputs.ids, inputs.branch, inputs.time, inputs.position, slots), strict=True
        ):
            column[:] = values
        arrays["sampled"][:] = inputs.logits_indices
        arrays["segment"][:] = inputs.segment
        arrays["adapter"][:] = inputs.adapter

    def _write_tiles(self, tiles: Tiles) -> None:
        arrays = self._arrays
        count, width = tiles.blocks.shape
        arrays["queries"][:count], arrays["queries"][count:] = tiles.queries, 0
        arrays["num_blocks"][:count], arrays["num_blocks"][count:] = tiles.num_blocks, 0
        is_used = np.arange(width) < tiles.num_blocks[:, None]
        arrays["blocks"][:] = self._scratch_block
        arrays["blocks"][:count, :width] = np.where(is_used, tiles.blocks, self._scratch_block)
        arrays["filled"][:] = 0
        arrays["filled"][:count, :width] = tiles.filled
        tokens, parts = tiles.parts.shape
        no_part = TILE * (self.bucket.tiles - 1)
        arrays["parts"][:] = no_part
        arrays["parts"][:tokens, :parts] = np.where(tiles.parts == NO_PART, no_part, tiles.parts)

    def _write_scores(self, inputs: ModelInput, tiles: Tiles) -> None:
        spans, arrays, count = inputs.spans, self._arrays, len(tiles.span)
        if not self.bucket.scores:
            return
        ends = np.cumsum([1, *(table.size for table in spans.scores)])
        arrays["scores"][: ends[-1]] = np.concatenate([np.zeros(1, np.float32), *map(np.ravel, spans.scores)])
        score = spans.score[tiles.span]
        widths = np.array([len(table) for table in spans.scores])
        for name, values in ("score_start", ends[score]), ("score_width", widths[score]):
            arrays[name][:] = 0
            arrays[name][:count] = np.where(score >= 0, values, 0)


def _layout(
    fields: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> tuple[dict[str, tuple[slice, tuple[int, ...], torch.dtype]], int]:
    """Where each buffer lies in one of bytes, and the size of that."""
    layout: dict[str, tuple[slice, tuple[int, ...], torch.dtype]] = {}
    end = 0
    for name, (shape, dtype) in fields.items():
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + prod(shape) * dtype.itemsize
        layout[name] = slice(start, end), shape, dtype
    return layout, end


def _fourfold(smallest: int, size: int) -> int:
    """The first of `smallest`, four times as much, and so on, that is not below `size`."""
    return smallest if size <= smallest else _fourfold(4 * smallest, size)
