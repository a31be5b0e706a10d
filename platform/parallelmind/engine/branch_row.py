"""A branch as the sampler reads it. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from parallelmind.engine.sequence import BranchState
from parallelmind.engine.sequence_group import SequenceGroup


class BranchRow:
    """A branch whose next token is sampled; a `SamplingRow` of the sampler. It follows the branch.

    matcher: of the grammar that the branch follows.
    """

    __slots__ = ("_group", "_state", "branch", "matcher", "params", "seed")

    def __init__(self, group: SequenceGroup, state: BranchState) -> None:
        self._group, self._state = group, state
        self.params, self.seed, self.branch = state.params, state.seed, group.draw_index(state)
        self.matcher = state.output.matcher

    @property
    def index(self) -> int:
        return self._state.num_tokens - self._state.num_prompt

    @property
    def history(self) -> Sequence[int]:
        return self._group.path_tokens(self._state)
