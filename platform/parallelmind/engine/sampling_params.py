"""Sampling settings of a branch, and their checks. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from reprlib import repr as short
from typing import Any, Self

from parallelmind.errors import UserError

MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BIAS = 100
MAX_STOPS = 16
MAX_STOP_CHARS = 1000

Biases = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How a branch is continued. Raises UserError for a value that means nothing.

    max_new_tokens: most tokens per branch.
    temperature: 0 always takes the likeliest token; 1 draws from the model's own distribution.
    top_k, top_p, min_p: draw only from the k likeliest tokens (0: all), from the fewest tokens that hold probability p
        (1: all), from those at least p times as likely as the likeliest (0: all).
    repetition_penalty: above 1 makes what a branch has already read or said less likely.
    logit_bias: token id -> number from -100 to 100 that is added to its logit; kept as (id, bias) pairs in order of id.
    stop: a branch ends before any of these texts.
    seed: the same seed draws the same tokens, whatever siblings a branch has; none draws from torch's global generator.
    ignore_eos: go on after the end-of-text token.
    logprobs: also give the log-probability of each chosen token, and of this many likeliest tokens; None gives neither.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Biases = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._whole("max_new_tokens", least=1)
        self._whole("top_k", least=0)
        if self.seed is not None:
            self._whole("seed", least=0)
        if self.logprobs is not None:
            self._whole("logprobs", least=0, most=MAX_LOGPROBS)
        self._number(
            "temperature",
            0 <= _float(self.temperature) < math.inf,
            "give 0 (greedy) or a finite number above it",
        )
        self._number("top_p", 0 < _float(self.top_p) <= 1, "give a number above 0 and up to 1")
        self._number("min_p", 0 <= _float(self.min_p) <= 1, "give a number from 0 to 1")
        self._number(
            "repetition_penalty",
            0 < _float(self.repetition_penalty) < math.inf,
            "give a number above 0; 1 is off",
        )
        object.__setattr__(self, "logit_bias", _checked_biases(self.logit_bias))
        object.__setattr__(self, "stop", _checked_stops(self.stop))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From keywords. Raises UserError for an unknown one."""
        known = [field.name for field in fields(cls)]
        for name, value in values.items():
            if name not in known:
                raise UserError(
                    f"{str(name)[:40]}={short(value)}: unknown sampling setting; choose from {', '.join(known)}"
                )
        return cls(**values)

    def _whole(self, name: str, least: int, most: int | None = None) -> None:
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            raise UserError(
                f"{name}={short(value)}: give a whole number from {least} {'up' if most is None else f'to {most}'}"
            )

    def _number(self, name: str, fits: bool, remedy: str) -> None:
        if not fits:
            raise UserError(f"{name}={short(getattr(self, name))}: {remedy}")


def _float(value: Any) -> float:
    """NaN, which fits no range, for whatever is no number or beyond every float."""
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def _checked_biases(value: Any) -> Biases:
    """(id, bias) pairs in order of id, from a mapping or from such pairs."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise UserError(f"logit_bias={short(value)}: give a mapping from token ids to numbers")
    if len(pairs) > MAX_BIASES:
        raise UserError(f"logit_bias={short(value)} ({len(pairs)} token ids): give at most {MAX_BIASES}")
    for token, bias in pairs:
        if (
            isinstance(token, bool)
            or not isinstance(token, int)
            or token < 0
            or not abs(_float(bias)) <= MAX_BIAS
        ):
            raise UserError(
                f"logit_bias={short({token: bias})}: give ids from 0 up with numbers from -{MAX_BIAS} to {MAX_BIAS}"
            )
    return tuple(sorted((token, float(bias)) for token, bias in dict(pairs).items()))


def _checked_stops(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(text, str) and text for text in value):
        raise UserError(f"stop={short(value)}: give a list of texts, none of them empty")
    if len(value) > MAX_STOPS:
        raise UserError(f"stop={short(value)} ({len(value)} texts): give at most {MAX_STOPS}")
    longest = max(value, key=len, default="")
    if len(longest) > MAX_STOP_CHARS:
        raise UserError(
            f"stop={short(longest)} ({len(longest)} characters): give texts of at most {MAX_STOP_CHARS} characters"
        )
    return tuple(value)
