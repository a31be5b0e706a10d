"""Requests to an engine: samples as texts and as token ids, and the progress of a resumed one. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from parallelmind.engine.output import FinishReason
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.errors import UserError, short_repr
from parallelmind.layout import Tokens

Text = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Sample:
    """A main (may be empty) and the branches that share it, each given as text or as token ids.

    Lists may be arrays. Raises UserError for branches that are not a list.
    """

    main: Text = ""
    branches: Sequence[Text] = ()

    def __post_init__(self) -> None:
        if not is_list(self.branches):
            raise UserError(f"branches={short_repr(self.branches)}: give a list of texts, one per branch")


def is_list(value: object) -> bool:
    """Whether a value is a sequence of items, or an array with dimensions. Text and bytes are not."""
    if isinstance(value, (str, bytes, bytearray, memoryview)):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0


@dataclass(frozen=True, slots=True)
class ReduceSpec:
    """The reduce branch: it starts when all other branches have finished, and attends to all of them.

    token_ids: its prompt.
    """

    token_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class TokenizedRequest:
    """A sample as token ids, with the sampling parameters of each branch and an optional reduce branch."""

    tokens: Tokens
    params: list[SamplingParams]
    reduce: ReduceSpec | None = None

    @property
    def num_branches(self) -> int:
        """Branches of the sample, the reduce branch included."""
        return self.tokens.branches + (self.reduce is not None)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of main and of all prompts, the reduce prompt included."""
        return len(self.tokens.ids) + (len(self.reduce.token_ids) if self.reduce else 0)

    @property
    def max_new_tokens(self) -> int:
        """Upper bound of the new tokens of all branches together."""
        new = sum(params.max_new_tokens for params in self.params)
        return new + (self.reduce.params.max_new_tokens if self.reduce else 0)


@dataclass(frozen=True, slots=True)
class ResumeState:
    """Progress of a sample on another engine, from which this engine resumes it. All lists are by branch.

    start_times: time coordinate of the first token of each branch that was submitted or joined. The reduce
    branch has no entry here, because its start follows from the other branches.
    token_ids: decoded tokens of each branch that has started, the reduce branch last.
    finish_reasons: as token_ids; None for a branch that still runs.
    """

    start_times: list[int]
    token_ids: list[list[int]]
    finish_reasons: list[FinishReason | None]
