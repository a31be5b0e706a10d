"""State of the segments of a sample while it is decoded, and the tokens that one step computes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from parallelmind.engine.block_table import BlockTable
from parallelmind.engine.output import FinishReason, OutputProcessor, TokenLogprob
from parallelmind.engine.path_hash import PathHash
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.tree import MAIN, NO_PARENT, Ints


@dataclass(eq=False, slots=True)
class SegmentState:
    """One segment of a sample: main, or a branch.

    number: 0 for main, then 1..N in the order in which branches were submitted or added.
    token_ids: all tokens that are known.
    start_time: time coordinate of the first token.
    parent: number of the segment that this one continues.
    is_reduce: whether it joins all branches of its parent.
    path: hash of all that the keys of the segment's tokens depend on, up to its computed blocks; None if they
        depend on more than the path.
    num_prefill: tokens to compute before a token can be decoded: the prompt, and tokens that were decoded
        before the sample was preempted or moved here.
    num_computed: tokens whose keys and values are in the cache.
    table: the cache blocks of the segment. In column order that of main holds all segments.
    """

    number: int
    token_ids: list[int]
    start_time: int = 0
    parent: int = NO_PARENT
    is_reduce: bool = False
    path: PathHash | None = None
    num_prefill: int = field(init=False)
    num_computed: int = 0
    table: BlockTable = field(default_factory=BlockTable)

    def __post_init__(self) -> None:
        self.num_prefill = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt(self) -> int:
        """Tokens that are given, not decoded."""
        return len(self.token_ids)

    @property
    def end_time(self) -> int:
        """Time coordinate of the next token."""
        return self.start_time + len(self.token_ids)

    @property
    def is_finished(self) -> bool:
        """Whether no token will be decoded any more."""
        return True

    @property
    def is_running(self) -> bool:
        """Whether tokens are decoded, or will be when the prefill is computed."""
        return False

    @property
    def is_decoding(self) -> bool:
        """Whether the segment runs and its prefill is computed."""
        return self.is_running and self.num_computed >= self.num_prefill

    @property
    def max_tokens(self) -> int:
        """Upper bound of the segment's length in tokens."""
        return len(self.token_ids)

    @property
    def num_waiting_prefill(self) -> int:
        return max(self.num_prefill - self.num_computed, 0)

    def reset(self) -> list[int]:
        """Forget what is computed, so that it is computed anew; returns the blocks."""
        self.num_prefill, self.num_computed = len(self.token_ids), 0
        if self.path is not None:
            self.path = self.path.start()
        return self.table.clear()


@dataclass(eq=False, slots=True, kw_only=True)
class BranchState(SegmentState):
    """The state of one segment after main: a branch or a reduce. It has no tokens until it starts.

    prompt: the tokens that it starts with.
    params: how it is continued. seed: `params.seed`, or that of the sample.
    output: turns decoded tokens into text and detects the end.
    finish_reason: None while the segment waits or runs.
    prompt_logprobs: of the prompt's tokens by their index, until the first token is decoded.
    """

    token_ids: list[int] = field(default_factory=list)
    prompt: list[int]
    params: SamplingParams
    seed: int
    output: OutputProcessor
    parent: int = MAIN
    has_started: bool = False
    finish_reason: FinishReason | None = None
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)

    def start(self, time: int, path: PathHash | None) -> None:
        """Start with the prompt at this time coordinate. path: the hash at the start."""
        self.has_started, self.start_time, self.path = True, time, path
        self.token_ids = [*self.prompt]
        self.num_prefill = self.num_prompt

    @property
    def index(self) -> int:
        """0..N-1, as events and callers count branches."""
        return self.number - 1

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @property
    def generated(self) -> list[int]:
        """Decoded token ids."""
        return self.token_ids[self.num_prompt :]

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def is_running(self) -> bool:
        return self.has_started and self.finish_reason is None

    @property
    def max_tokens(self) -> int:
        return len(self.token_ids) if self.is_finished else self.num_prompt + self.params.max_new_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are computed with it."""
        asks = self.params.prompt_logprobs is not None
        return asks and self.is_running and len(self.token_ids) == self.num_prompt

    def pop_prompt_logprobs(self) -> tuple[TokenLogprob, ...]:
        """The tokens of the prompt for the first event; empty if they are not asked for."""
        if not self.scores_prompt:
            return ()
        found, self.prompt_logprobs = self.prompt_logprobs, {}
        return tuple(found.get(index, TokenLogprob(token)) for index, token in enumerate(self.prompt))

    def append_token(self, token: int) -> tuple[str, FinishReason | None]:
        """Append a decoded token; returns the new text to show, and why the branch finishes, if it does."""
        self.token_ids.append(token)
        return self.output.process(token)

    def append_tokens(self, token_ids: Sequence[int], finished: bool = False) -> None:
        """Append tokens that another engine decoded and emitted. Call before the branch is scheduled.

        finished: whether the branch emits nothing any more, so that its text is not needed.
        """
        self.token_ids += token_ids
        self.num_prefill = len(self.token_ids)
        for token in () if finished else token_ids:
            self.output.process(token)
            if self.output.titles:  # the other engine has refused the fork
                self.output.refuse_fork()


class PromptLabels(NamedTuple):
    """Prompt tokens whose log-probabilities a step computes. All are `[labels]`.

    logits_indices: the scheduled tokens before them. branches, positions: their branches, and indices there.
    """

    logits_indices: Ints
    branches: Ints
    positions: Ints


NO_LABELS = PromptLabels(*np.empty((3, 0), np.int64))


@dataclass(frozen=True, slots=True, eq=False)
class ScheduledTokens:
    """Tokens of one sample that a step computes. The first five are `[tokens]`, in physical order.

    segment: 0 for main, 1..N for the branches.
    branch, time: the pos2d coordinates.
    position: the coordinate of the rotary pairs that pos2d does not drive.
    counts: `[segments]` number of these tokens of each segment.
    next_column: the column after all of these tokens (column order).
    logits_indices: `[sampled]` tokens whose logits are needed.
    sampled_branches: `[sampled]` indices of the branches that these logits continue.
    labels: prompt tokens whose log-probabilities are needed.
    """

    ids: Ints
    segment: Ints
    branch: Ints
    time: Ints
    position: Ints
    counts: Ints
    next_column: int
    logits_indices: Ints
    sampled_branches: Ints
    labels: PromptLabels = NO_LABELS
