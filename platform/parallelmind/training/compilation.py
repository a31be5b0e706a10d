"""Compiled decoder layers, and batches of few shapes for them.

torch compiles a layer for each shape of its input. What it makes then depends on that shape alone, and not on
the batches before it, so a resumed run computes what an undisturbed one does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from parallelmind.errors import UserError
from parallelmind.layout import IGNORE, PADDING, Batch
from parallelmind.model.hf_compat import decoder_layers
from parallelmind.model.structure import causal_lm
from parallelmind.tree import UNRELATED

_BACKEND = "inductor"
_SHORTEST = 64  # tokens of a row
_MAX_SHAPES = 256  # of a layer in training and validation; torch would not compile more than 8


def compile_layers(model: nn.Module) -> None:
    """Compile every decoder layer in place, at its first call with each shape.

    Raises UserError if the model has none that this package knows.
    """
    layers = decoder_layers(causal_lm(model))
    if not layers:
        raise UserError("compile=true: finds no decoder layers in this model; drop it")
    for layer in layers:
        layer.compile(backend=_BACKEND, dynamic=False, recompile_limit=_MAX_SHAPES)


def bucket(size: int) -> int:
    """The smallest power of two, or one and a half of one, that is not below `size`."""
    power = 1 << max(size - 1, 0).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


def pad_to_bucket(batch: Batch) -> Batch:
    """The batch with padding up to buckets of rows, tokens and segments. Its loss is the same."""
    rows, tokens = batch.ids.shape
    rows, tokens = bucket(rows), max(bucket(tokens), _SHORTEST)
    segments = bucket(batch.relations.shape[-1])  # the last index stays that of padding
    return replace(
        batch,
        ids=_pad(batch.ids, (rows, tokens), 0),
        segment=_pad(batch.segment, (rows, tokens), PADDING),
        pos2d=_pad(batch.pos2d, (rows, tokens, 2), 0),
        position=_pad(batch.position, (rows, tokens), 0),
        labels=_pad(batch.labels, (rows, tokens), IGNORE),
        relations=_pad(batch.relations, (rows, segments, segments), UNRELATED),
    )


def _pad(array: NDArray[Any], shape: tuple[int, ...], value: int) -> NDArray[Any]:
    widths = [(0, size - own) for size, own in zip(shape, array.shape, strict=True)]
    return np.pad(array, widths, constant_values=value)
