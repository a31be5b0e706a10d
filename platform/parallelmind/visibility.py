"""Visibility rules: which tokens a token may attend to, in training, prefill and every decoding step.

Rules use operators only, so they work on arrays of NumPy and torch. A layer's window or chunk restricts
visibility further. It is measured in time, since neighbours in storage may be far apart in time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from parallelmind.config import RopeConfig, Visibility
from parallelmind.layout import MAIN

Array = TypeVar("Array", bound=Any)  # of NumPy or torch


def columnar(q_time: Array, q_sequence: Array, k_time: Array, k_sequence: Array) -> Array:
    """Everything earlier in time."""
    return k_time < q_time


def isolated(q_time: Array, q_sequence: Array, k_time: Array, k_sequence: Array) -> Array:
    """Everything earlier in time in main or in the token's own branch."""
    return (k_time < q_time) & ((k_sequence == MAIN) | (k_sequence == q_sequence))


def is_sibling(q_sequence: Array, k_sequence: Array) -> Array:
    """Whether query and key are tokens of different branches."""
    return (q_sequence > MAIN) & (k_sequence > MAIN) & (k_sequence != q_sequence)


def effective_penalty(config: RopeConfig) -> float:
    """The number subtracted from the scores of siblings: 0 where siblings are not visible."""
    return config.sibling_penalty if config.visibility == "columnar" else 0.0


RULES: dict[Visibility, Callable[..., Any]] = {"columnar": columnar, "isolated": isolated}


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
