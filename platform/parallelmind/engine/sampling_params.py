"""Sampling settings of a branch, and their checks. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from parallelmind.config.other_names import NamedFields, check_names
from parallelmind.engine.grammar import Grammar
from parallelmind.errors import UserError, short_repr

MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BIAS = 100
MAX_STOPS = 16
MAX_STOP_CHARS = 1000

Biases = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams(NamedFields):
    """How a branch is continued. Numbers may be those of NumPy. Raises UserError for a value out of range.

    max_new_tokens: upper bound of the branch's decoded tokens; 0: others read the branch, such as a document.
    temperature: 0 takes the most likely token; 1 samples from the model's own distribution.
    top_k: sample from the k most likely tokens; 0: from all.
    top_p: sample from the fewest tokens that hold this probability; 1: from all.
    min_p: sample from the tokens whose probability is at least this share of the highest one; 0: from all.
    repetition_penalty: above 1 makes tokens of main, of the prompt and decoded tokens less likely.
    logit_bias: numbers from -100 to 100 by token id, which are added to the logits; kept as sorted
        (id, bias) pairs.
    stop: the branch finishes before any of these texts.
    seed: equal seeds sample equal tokens, independently of the siblings; None draws a seed from torch's
        global generator.
    ignore_eos: continue after an end-of-text token.
    logprobs: return the log-probability of each token, and of this many most likely tokens; None: neither.
    prompt_logprobs: the same for the tokens of the branch's prompt; the first event has them.
    grammar: decode only what follows it: `{"json": schema}`, `{"regex": text}` or `{"choice": texts}`, kept
        as a `Grammar`. The branch finishes where its text is complete. Log-probabilities are of the tokens
        that the grammar allows.
    max_fork_branches: branches of one fork that the model may write itself; 0: it does not fork. A model does
        that was trained with `fork_markers`, where the branch follows no grammar.
    max_fork_depth: levels of branches that it may open below this one.
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
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    max_fork_branches: int = 16
    max_fork_depth: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        self._check_integer("max_new_tokens", 0)
        self._check_integer("top_k", 0)
        self._check_integer("max_fork_branches", 0)
        self._check_integer("max_fork_depth", 0)
        if self.seed is not None:
            self._check_integer("seed", 0)
        if self.logprobs is not None:
            self._check_integer("logprobs", 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            self._check_integer("prompt_logprobs", 0, MAX_LOGPROBS)
            self._check(
                "max_new_tokens", self.max_new_tokens > 0, "prompt_logprobs needs at least 1; raise it"
            )
        temperature, penalty = _number(self.temperature), _number(self.repetition_penalty)
        self._check("temperature", 0 <= temperature < math.inf, "give 0 (greedy) or a finite number above it")
        self._check("top_p", 0 < _number(self.top_p) <= 1, "give a number above 0 and up to 1")
        self._check("min_p", 0 <= _number(self.min_p) <= 1, "give a number from 0 to 1")
        self._check("ignore_eos", isinstance(self.ignore_eos, bool), "give True or False")
        self._check("repetition_penalty", 0 < penalty < math.inf, "give a number above 0; 1 is off")
        if self.grammar is not None:
            object.__setattr__(self, "grammar", _grammar(self.grammar))
            self._check("ignore_eos", not self.ignore_eos, "a grammar ends the text; leave one of them out")
        object.__setattr__(self, "logit_bias", _checked_biases(self.logit_bias))
        object.__setattr__(self, "stop", _checked_stops(self.stop))

    @property
    def may_fork(self) -> bool:
        """Whether the branch may fork by itself."""
        return self.max_fork_branches > 0 and self.max_fork_depth > 0 and self.grammar is None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """From keywords. Raises UserError for an unknown one."""
        check_names(values, [field.name for field in fields(cls)], "sampling setting")
        return cls(**values)

    def settings(self) -> dict[str, Any]:
        """All fields by name: what `of` takes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _check_integer(self, field: str, minimum: int, maximum: int | None = None) -> None:
        value = getattr(self, field)
        fits = _is_integer(value) and value >= minimum and (maximum is None or value <= maximum)
        self._check(
            field,
            fits,
            f"give a whole number from {minimum} {'up' if maximum is None else f'to {maximum}'}",
        )

    def _check(self, field: str, fits: bool, remedy: str) -> None:
        if not fits:
            raise UserError(f"{field}={short_repr(getattr(self, field))}: {remedy}")


def _grammar(value: Any) -> Grammar:
    return value if isinstance(value, Grammar) else Grammar.of(value)


def _plain(value: Any) -> Any:
    """The Python number in a number of NumPy, or in a tensor without dimensions; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> float:
    """The value as a float; NaN, which fits no range, if it is not a number or too large."""
    try:
        return float(value) if isinstance(value, float) or _is_integer(value) else math.nan
    except OverflowError:
        return math.nan


def _checked_biases(value: Any) -> Biases:
    """(id, bias) pairs in order of id, from a mapping or from such pairs."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    if isinstance(pairs, tuple):
        pairs = tuple(tuple(map(_plain, pair)) if isinstance(pair, tuple) else pair for pair in pairs)
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise UserError(f"logit_bias={short_repr(value)}: give a mapping from token ids to numbers")
    if len(pairs) > MAX_BIASES:
        raise UserError(f"logit_bias={short_repr(value)} ({len(pairs)} token ids): give at most {MAX_BIASES}")
    for token, bias in pairs:
        if not (_is_integer(token) and token >= 0 and abs(_number(bias)) <= MAX_BIAS):
            raise UserError(
                f"logit_bias={short_repr({token: bias})}: give ids from 0 up with numbers from -{MAX_BIAS} "
                f"to {MAX_BIAS}"
            )
    return tuple(sorted((token, float(bias)) for token, bias in dict(pairs).items()))


def _checked_stops(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(text, str) and text for text in value):
        raise UserError(f"stop={short_repr(value)}: give a list of texts, none of them empty")
    if len(value) > MAX_STOPS:
        raise UserError(f"stop={short_repr(value)} ({len(value)} texts): give at most {MAX_STOPS}")
    longest = max(value, key=len, default="")
    if len(longest) > MAX_STOP_CHARS:
        raise UserError(
            f"stop={short_repr(longest)} ({len(longest)} characters): give texts of at most {MAX_STOP_CHARS} "
            "characters"
        )
    return tuple(value)
