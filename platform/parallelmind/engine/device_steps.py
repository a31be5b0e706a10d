"""Steps on an accelerator: inputs in buffers of a few sizes, and a captured graph for each decoding size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallelmind.engine.attention_spans import AttentionSpans, make_spans
from parallelmind.engine.batch import PADDING, ModelInput, single_token
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.block_table import BlockTables, Int32s
from parallelmind.engine.flex_attention import FlexAttention, SlotMetadata
from parallelmind.engine.step_buffers import Bucket, StepBuffers
from parallelmind.engine.tiles import Tiles
from parallelmind.errors import UserNotice, first_line

Forward = Callable[[ModelInput, StepBuffers, FlexAttention], Tensor]

_MAX_CAPTURED_TOKENS = 256  # of a step; a larger one takes longer to compute than to launch
_WARM_TOKENS = (4, 5, 16, 17, 64)  # of steps that have all sizes in which up to 64 branches decode
_WARM_PROMPTS = (64, 256, 1024)  # tokens of steps that compute prompts


class DeviceSteps:
    """Runs the steps of one cache. Every step that writes to the cache has to be run here.

    A step that computes nothing but newest tokens is captured as a CUDA graph: the first of a size and an
    adapter is run as it is, which compiles its kernels, the second is captured, and all others are replayed.
    """

    def __init__(self, forward: Forward, tables: BlockTables, num_blocks: int, device: torch.device) -> None:
        """forward: `[sampled, vocab]` logits of a step in buffers.

        num_blocks: blocks of the cache. There is one more, for padding.
        """
        self._forward, self._device = forward, device
        self._scratch_block = num_blocks
        size = BLOCK * (num_blocks + 1)
        self._slots = SlotMetadata(
            *(_on_device(column, size, device) for column in (tables.time, tables.segment))
        )
        self._buffers: dict[Bucket, StepBuffers] = {}
        self._graphs: dict[tuple[Bucket, str], _Graph | None] = {}  # None: to be captured next time
        self._captures = device.type == "cuda"

    def __call__(self, inputs: ModelInput, ids: Tensor | None = None) -> Tensor:
        """`[sampled, vocab]` logits of a step.

        ids: `[tokens]` in place of those of the inputs, on the device; negative for a token that is not used.
        """
        tiles = Tiles.of(inputs)
        buffers = self._buffers_for(Bucket.of(inputs, tiles))
        padded = inputs.padded(buffers.bucket.tokens, buffers.bucket.sampled)
        buffers.send(padded, tiles)
        if ids is not None:
            buffers.columns[0, : len(ids)] = ids.clamp(min=0)
        return self._run(padded, buffers)[: len(inputs.logits_indices)]

    def warm_up(self, has_scores: bool) -> None:
        """Compile the kernels of decoding steps of up to `_WARM_TOKENS[-1]` tokens, and of prompts.

        has_scores: whether samples have score tables. Larger sizes are compiled when they first occur.
        """
        for inputs in _warm_up_inputs(has_scores):
            self(inputs)

    def forget_graphs(self) -> None:
        """Capture anew: the model's weights or adapters have changed."""
        if self._graphs and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # one of them may run
        self._graphs.clear()

    def _buffers_for(self, bucket: Bucket) -> StepBuffers:
        """Buffers of this size, or of the same number of tokens and a larger size whose kernels are compiled.

        Kernels do not depend on how many tokens are sampled.
        """
        if bucket not in self._buffers:
            larger = (other for other in self._buffers if other.holds(bucket))
            bucket = min(larger, key=Bucket.kernel_size, default=bucket)._replace(sampled=bucket.sampled)
        if bucket not in self._buffers:
            scratch = self._scratch_block
            self._buffers[bucket] = StepBuffers(bucket, self._device, scratch * BLOCK, scratch)
        return self._buffers[bucket]

    def _run(self, inputs: ModelInput, buffers: StepBuffers) -> Tensor:
        bucket, adapter = buffers.bucket, inputs.adapters[0]
        key = bucket, adapter
        only_decodes = bucket.sampled == bucket.tokens <= _MAX_CAPTURED_TOKENS
        if not (self._captures and only_decodes):
            return self._compute(inputs, buffers)
        if key not in self._graphs:
            self._graphs[key] = None
            return self._compute(inputs, buffers)
        graph = self._graphs[key] or self._capture(inputs, buffers)
        if graph is None:
            return self._compute(inputs, buffers)
        self._graphs[key] = graph
        return graph.replay()

    def _compute(self, inputs: ModelInput, buffers: StepBuffers) -> Tensor:
        return self._forward(inputs, buffers, FlexAttention(buffers, self._slots))

    def _capture(self, inputs: ModelInput, buffers: StepBuffers) -> _Graph | None:
        """The step as a graph; None, with a notice, for a model that cannot be captured."""
        try:
            return _Graph(lambda: self._compute(inputs, buffers))
        except Exception as error:  # of the model or of CUDA, whose code this is not
            self._captures = False
            reason = f"{type(error).__name__}: {first_line(error)}"
            warnings.warn(
                f"decoding steps are not captured as CUDA graphs ({reason})", UserNotice, stacklevel=2
            )
            return None


class _Graph:
    """A captured step. Its inputs are the buffers that it was captured with."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        cuda: Any = torch.cuda
        self._graph = cuda.CUDAGraph()
        cuda.synchronize()
        with cuda.graph(self._graph):
            self._logits = compute()

    def replay(self) -> Tensor:
        """The logits for what the buffers hold now."""
        self._graph.replay()
        return self._logits.clone()  # the next replay overwrites them


def _warm_up_inputs(has_scores: bool) -> Iterator[ModelInput]:
    """Steps whose tokens read a key of their own, and one in common if samples have no score tables."""
    one = single_token()
    row = int(one.spans.tables[0])
    for count in _WARM_PROMPTS:
        common = list(range(count))
        spans = make_spans([0, 1], [common, common], [[row], [row]])
        if has_scores:
            spans = _with_scores(make_spans([0], [common], [[row]]))
        num_keys, slots = np.ones(len(spans.tables), np.int64), np.full(count, PADDING)
        yield replace(one.padded(count), spans=spans, num_keys=num_keys, slots=slots)
    for count in _WARM_TOKENS:
        own, common = [[token] for token in range(count)], list(range(count))
        if has_scores:
            choices = [_with_scores(make_spans([0], [common], [[row]]))]
        else:
            choices = [
                make_spans([1] * len(queries), queries, [[row]] * len(queries))
                for queries in (own, [common, *own])
            ]
        for spans in choices:
            num_keys, slots = np.ones(len(spans.tables), np.int64), np.full(count, PADDING)
            yield replace(one.padded(count, count), spans=spans, num_keys=num_keys, slots=slots)


def _with_scores(spans: AttentionSpans) -> AttentionSpans:
    return replace(spans, score=np.zeros(1, np.int32), scores=(np.zeros((2, 2), np.float32),))


def _on_device(column: Int32s, size: int, device: torch.device) -> Tensor:
    """A copy, with zeros behind its end."""
    return torch.from_numpy(np.pad(column, (0, size - len(column)))).to(device)
