"""From logits to the next tokens: transformers' own processors, then one draw per branch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from parallelmind.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How a branch is continued. Raises UserError for a value that means nothing.

    max_new_tokens: most tokens per branch.
    temperature: 0 always takes the likeliest token; 1 draws from the model's own distribution.
    top_k, top_p, min_p: draw only from the k likeliest tokens (0: all), from the fewest tokens that hold probability p
        (1: all), from those at least p times as likely as the likeliest (0: all).
    repetition_penalty: above 1 makes what a branch has already read or said less likely.
    stop: a branch ends before any of these texts.
    seed: the same seed draws the same tokens, whatever siblings a branch has; none draws from torch's global generator.
    ignore_eos: go on after the end-of-text token.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._whole("max_new_tokens", least=1)
        self._whole("top_k", least=0)
        if self.seed is not None:
            self._whole("seed", least=0)
        self._number("temperature", 0 <= _float(self.temperature) < math.inf, "give 0 (greedy) or a finite number above it")
        self._number("top_p", 0 < _float(self.top_p) <= 1, "give a number above 0 and up to 1")
        self._number("min_p", 0 <= _float(self.min_p) <= 1, "give a number from 0 to 1")
        self._number("repetition_penalty", 0 < _float(self.repetition_penalty) < math.inf, "give a number above 0; 1 is off")
        stop: Any = self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
            raise UserError(f"stop={stop!r}: give a list of texts, none of them empty")
        object.__setattr__(self, "stop", tuple(stop))

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """From keywords. Raises UserError for an unknown one."""
        known = [field.name for field in fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise UserError(f"{name}={value!r}: unknown sampling setting; choose from {', '.join(known)}")
        return cls(**values)

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name}={value!r}: give a whole number from {least} up")

    def _number(self, name: str, fits: bool, remedy: str) -> None:
        if not fits:
            raise UserError(f"{name}={getattr(self, name)!r}: {remedy}")


def _float(value: Any) -> float:
    """NaN, which fits no range, for whatever is no number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def processors(params: SamplingParams) -> LogitsProcessorList:
    """transformers' processors in its own order; those that would change nothing are left out."""
    chosen = LogitsProcessorList()
    if params.repetition_penalty != 1:
        chosen.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.temperature == 0:  # greedy: nothing below moves the maximum
        return chosen
    if params.temperature != 1:
        chosen.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k:
        chosen.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chosen.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chosen.append(MinPLogitsWarper(params.min_p))
    return chosen


def generators(params: SamplingParams, branches: int) -> list[torch.Generator]:
    """One generator per branch, seeded by the branch's index: what siblings draw never shifts it. None for greedy."""
    if params.temperature == 0:
        return []
    seed = int(torch.randint(2**62, ())) if params.seed is None else params.seed
    states = (np.random.SeedSequence([seed, branch]).generate_state(1, np.uint64) for branch in range(branches))
    return [torch.Generator().manual_seed(int(state[0])) for state in states]


def sample(logits: Tensor, chosen: LogitsProcessorList, history: Any, draws: list[torch.Generator]) -> Tensor:
    """`[live]` next ids.

    logits: `[live, vocab]`. history: `[live, tokens]` ids that each branch has read or said; None will do where no
    processor is chosen. draws: one generator for each live branch, or none of them for greedy.
    """
    scores = chosen(history, logits.float()) if chosen else logits
    if not draws:
        return scores.argmax(dim=-1)
    # Inverse of the cumulative distribution: one number per branch instead of one per word of the vocabulary.
    cumulative = scores.softmax(dim=-1).double().cumsum(dim=-1)
    uniform = torch.stack([torch.rand(1, generator=draw, dtype=torch.float64) for draw in draws]).to(cumulative.device)
    picked = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return picked.squeeze(-1).clamp_(max=logits.shape[-1] - 1)
