"""Visibility: one function per policy, used by training, prefill and every decode step alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parallelmind.config import Visibility
from parallelmind.layout import MAIN, PADDING

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def columnar(q_time: Tensor, q_sequence: Tensor, k_time: Tensor, k_sequence: Tensor) -> Tensor:
    """Everything earlier in time, whoever wrote it."""
    return k_time < q_time


def isolated(q_time: Tensor, q_sequence: Tensor, k_time: Tensor, k_sequence: Tensor) -> Tensor:
    """Everything earlier in main or in the own branch."""
    return (k_time < q_time) & ((k_sequence == MAIN) | (k_sequence == q_sequence))


RULES: dict[Visibility, Rule] = {"columnar": columnar, "isolated": isolated}


def visible(time: Tensor, sequence: Tensor, visibility: Visibility, queries: int | None = None) -> Tensor:
    """Which key every query sees.

    time, sequence: `[batch, keys]` integers, sequence -1 where there is only padding. The queries are the last
    `queries` keys (all of them by default). Returns bool `[batch, 1, queries, keys]`; every token sees itself, so no
    row is empty, and padding is seen by nothing else.
    """
    keys = time.shape[-1]
    first = keys - (keys if queries is None else queries)
    q_time, q_sequence = time[:, first:, None], sequence[:, first:, None]
    k_time, k_sequence = time[:, None, :], sequence[:, None, :]
    seen = RULES[visibility](q_time, q_sequence, k_time, k_sequence)
    seen &= (k_sequence != PADDING) & (q_sequence != PADDING)
    seen.diagonal(offset=first, dim1=-2, dim2=-1).fill_(True)
    return seen[:, None]


def for_attention(seen: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """The mask in the form that the model's attention takes, made once for all layers.

    sdpa takes bool; on a CPU its kernel turns bool into additive floats again in every layer, and keeps each of them for
    the backward pass. eager silently ignores bool. Raises ValueError for any other kind.
    """
    if implementation not in ("sdpa", "eager"):
        raise ValueError(f"attn_implementation={implementation!r}: branch masks need sdpa or eager")
    if implementation == "sdpa" and seen.device.type != "cpu":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
