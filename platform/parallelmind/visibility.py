"""Visibility: which tokens a token may attend to, in training, prefill and every decoding step.

A token sees itself, and every token that is earlier in time and whose segment has a visible relation to its
own (`tree.relations`). A layer's window or chunk restricts visibility further. It is measured in time, since
neighbours in storage may be far apart in time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from parallelmind.config import RopeConfig, Visibility
from parallelmind.tree import JOINED, PATH, SIBLING

Array = TypeVar("Array", bound=Any)  # of NumPy or torch


def relation_scores(visibility: Visibility, penalty: float = 0.0) -> NDArray[np.float32]:
    """`[relations]` summand of the attention score for each relation; minus infinity where it is not visible.

    penalty: subtracted from the scores of siblings, where these are visible.
    """
    scores = np.full(4, -np.inf, dtype=np.float32)
    scores[[PATH, JOINED]] = 0
    if visibility == "columnar":
        scores[SIBLING] = -penalty
    return scores


def learns_penalty(config: RopeConfig) -> bool:
    """Whether every head of every layer learns the number that is subtracted from the scores of siblings."""
    return config.visibility == "columnar" and config.sibling_penalty == "learned"


def effective_penalty(config: RopeConfig) -> float:
    """The number subtracted from the scores of siblings: 0 where siblings are not visible.

    Where it is learned, 1: the unit that every head multiplies by its own number.
    """
    if config.visibility != "columnar":
        return 0.0
    return 1.0 if isinstance(config.sibling_penalty, str) else config.sibling_penalty


@dataclass(frozen=True, slots=True)
class AttentionWindow:
    """How far back a layer looks, in time: the last `window` tokens, or the query's chunk."""

    window: int | None = None
    chunk: int | None = None

    def within(self, q_time: Array, k_time: Array) -> Array | None:
        """Which keys are within the window; None if all are."""
        if self.chunk is not None:
            return q_time // self.chunk == k_time // self.chunk
        return None if self.window is None else q_time - k_time < self.window
