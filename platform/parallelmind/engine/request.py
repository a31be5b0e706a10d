"""What is decoded and what comes back: samples, events, and the checks that come before any computing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from reprlib import repr as short
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from parallelmind.data.encode import encode_text
from parallelmind.engine.model_runner import Model
from parallelmind.engine.sampler import SamplingParams
from parallelmind.engine.sequence import FinishReason
from parallelmind.errors import UserError, first_line
from parallelmind.layout import Tokens

Text = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Sample:
    """What to continue: branches that share `main`, which may be empty. Texts, or token ids in their
    place.
    """

    main: Text = ""
    branches: Sequence[Text] = ()

    def __post_init__(self) -> None:
        if isinstance(self.branches, str):
            raise UserError(f"branches={self.branches!r}: give a list of texts, one per branch")


@dataclass(frozen=True, slots=True)
class Event:
    """What one decoded token adds to one branch.

    branch: 0..N-1, as in the sample. text: new text to show, often empty while a character or a stop text is
    incomplete. token: the decoded id, None where a branch ends without one. finish_reason: set on a branch's
    last event; stop is an end-of-text token or a stop text. logprob, top: as `SamplingParams.logprobs` asks.
    sample: the engine's number of it. pos2d: the branch and time coordinates of the token.
    """

    branch: int
    text: str
    token: int | None
    finish_reason: FinishReason | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    sample: int = 0
    pos2d: tuple[int, int] | None = None


def encode_sample(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Tokens:
    """Token ids of a sample, as training sees them. Raises UserError if there is no branch or an empty
    one.
    """
    main = encode(tokenizer, sample.main, first=True) if sample.main else []
    return Tokens.of(main, [encode(tokenizer, branch, first=not main) for branch in sample.branches])


def encode(tokenizer: PreTrainedTokenizerBase, text: Text, first: bool) -> list[int]:
    """`first`: whether it opens the sample. Raises UserError for what is neither text nor token ids."""
    if isinstance(text, str):
        return encode_text(tokenizer, text, first)
    try:
        return np.array([index(token) for token in text], dtype=np.int64).tolist()
    except (TypeError, OverflowError) as error:
        raise UserError(
            f"tokens={short(text)}: give text, or a list of token ids ({first_line(error)})"
        ) from error


def end_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a text, by the model's generation config and by the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(int(token) for token in (*several, tokenizer.eos_token_id) if token is not None)


def settings_of(
    sampling: dict[str, Any], per_branch: Sequence[dict[str, Any]] | None, branches: int
) -> list[SamplingParams]:
    """The settings of every branch: its own over those of all. Raises UserError for a bad one, and for too
    few or many.
    """
    if per_branch is None:
        return [SamplingParams.of(sampling)] * branches
    if len(per_branch) != branches:
        raise UserError(
            f"per_branch: {len(per_branch)} settings for {branches} branches; give one dict per branch, {{}} for none"
        )
    return [SamplingParams.of({**sampling, **own}) for own in per_branch]
