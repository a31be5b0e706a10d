"""Rows for the sampler without branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.tree import Ints


@dataclass(frozen=True)
class Row:
    """A `SamplingRow`."""

    params: SamplingParams
    seed: int
    branch: int
    index: int
    history: Sequence[int] | Ints
