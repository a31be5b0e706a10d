"""Who sees whom: one rule per policy, which training, prefill and every decoding step ask. Operators alone,
no torch.

A layer's own window or chunk narrows it further, measured in time: what is near in storage may be far in a
branch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from parallelmind.config import RopeConfig, Visibility
from parallelmind.layout import MAIN

Array = TypeVar("Array", bound=Any)  # of NumPy or torch


def columnar(q_time: Array, q_sequence: Array, k_time: Array, k_sequence: Array) -> Array:
    """Everything earlier in time, whoever wrote it."""
    return k_time < q_time


def isolated(q_time: Array, q_sequence: Array, k_time: Array, k_sequence: Array) -> Array:
    """Everything earlier in main or in the own branch."""
    return (k_time < q_time) & ((k_sequence == MAIN) | (k_sequence == q_sequence))


def is_sibling(q_sequence: Array, k_sequence: Array) -> Array:
    """Tokens of another branch, as a branch sees them."""
    return (q_sequence > MAIN) & (k_sequence > MAIN) & (k_sequence != q_sequence)


def effective_penalty(config: RopeConfig) -> float:
    """What is taken off the scores of siblings: nothing where they are not seen."""
    return config.sibling_penalty if config.visibility == "columnar" else 0.0


RULES: dict[Visibility, Callable[..., Any]] = {"columnar": columnar, "isolated": isolated}


@dataclass(frozen=True, slots=True)
class AttentionWindow:
    """How far back a kind of layer looks, in time: the last `window` tokens, or its own chunk of `chunk`
    tokens.
    """

    window: int | None = None
    chunk: int | None = None

    def within(self, q_time: Array, k_time: Array) -> Array | None:
        """Which keys are near enough; None if all are."""
        if self.chunk is not None:
            return q_time // self.chunk == k_time // self.chunk
        return None if self.window is None else q_time - k_time < self.window
