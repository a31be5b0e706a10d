"""State of one branch while it is decoded, and the tokens of a sample that one step computes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from parallelmind.engine.block_manager import BlockTable
from parallelmind.engine.output import FinishReason, OutputProcessor
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.tree import Ints


@dataclass(eq=False, slots=True)
class BranchState:
    """One branch of a sample.

    index: 0..N-1, in the order in which branches were submitted or added.
    token_ids: the prompt, then the decoded tokens.
    start_time: time coordinate of the first prompt token.
    seed: `params.seed`, or that of the sample.
    output: turns decoded tokens into text and detects the end.
    num_prompt: tokens of the prompt.
    num_prefill: tokens to compute before the branch decodes: the prompt, and tokens of another engine.
    num_computed: tokens that a step has computed or is computing.
    finish_reason: None while the branch runs.
    block_table: the cache blocks of the branch, where it has its own (free order).
    """

    index: int
    token_ids: list[int]
    start_time: int
    params: SamplingParams
    seed: int
    output: OutputProcessor
    num_prompt: int = field(init=False)
    num_prefill: int = field(init=False)
    num_computed: int = 0
    finish_reason: FinishReason | None = None
    block_table: BlockTable | None = None

    def __post_init__(self) -> None:
        self.num_prompt = self.num_prefill = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def end_time(self) -> int:
        """Time coordinate of the next token."""
        return self.start_time + len(self.token_ids)

    @property
    def generated(self) -> list[int]:
        """Decoded token ids."""
        return self.token_ids[self.num_prompt :]

    @property
    def is_running(self) -> bool:
        return self.finish_reason is None

    @property
    def is_decoding(self) -> bool:
        """Whether the branch runs and its prefill is computed."""
        return self.is_running and self.num_computed >= self.num_prefill

    @property
    def max_tokens(self) -> int:
        """Upper bound of the branch's length in tokens."""
        return self.num_prompt + self.params.max_new_tokens if self.is_running else len(self.token_ids)

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


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """Tokens of one sample that the next step computes. The first five are `[tokens]`, in physical order.

    segment: 0 for main, 1..N for the branches.
    branch, time: the pos2d coordinates.
    position: the coordinate of the rotary pairs that pos2d does not drive.
    logits_indices: `[sampled]` tokens whose logits are needed.
    sampled_branches: `[sampled]` indices of the branches that these logits continue.
    """

    ids: Ints
    segment: Ints
    branch: Ints
    time: Ints
    position: Ints
    logits_indices: Ints
    sampled_branches: Ints
