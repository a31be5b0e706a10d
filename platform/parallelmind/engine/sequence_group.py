"""A sample in the engine's hands: what it may grow to, and where it is stored. Plain Python and NumPy, no
tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from parallelmind.engine.batch import SequenceBlocks
from parallelmind.engine.block_manager import blocks_for
from parallelmind.engine.sequence import SequenceState


@dataclass(frozen=True, slots=True)
class Reduction:
    """A branch that follows when all others have ended, and reads main and all of them."""

    ids: list[int]
    most: int  # new tokens


@dataclass(eq=False, slots=True)
class Running:
    """A sample that is being decoded, or waits for it. most: new tokens that each branch may be given."""

    number: int
    version: str
    decoding: SequenceState
    most: list[int]
    reduction: Reduction | None = None
    storage: SequenceBlocks | None = None
    keys: list[bytes] = field(default_factory=list)  # of main's full blocks
    shared: int = 0  # how many of them are shared
    reserved: list[int] = field(
        default_factory=list
    )  # blocks of the reducing branch, where it has a stream of its own

    def tokens_of(self, branch: int) -> int:
        """All that a branch can still come to hold, its prompt and the newest token included."""
        state = self.decoding
        return (
            int(state.prompt_lengths[branch]) + self.most[branch]
            if state.live[branch]
            else int(state.lengths[branch])
        )

    def trunk_tokens(self) -> int:
        """The length that the trunk can still come to: main and, unless the order is free, everything
        else.
        """
        state, after = self.decoding, self.reduction
        if state.free:
            return len(state.main)
        coming = len(after.ids) + after.most if after else 0
        return len(state.main) + sum(map(self.tokens_of, range(len(self.most)))) + coming

    def branch_tokens(self) -> list[int]:
        """Where the order is free: the length that each branch can come to be read at, the reducing one
        last.
        """
        if not self.decoding.free:
            return []
        after = [len(self.reduction.ids) + self.reduction.most] if self.reduction else []
        live = self.decoding.live
        return [
            self.tokens_of(branch) if self.keeps_ended or live[branch] else 0 for branch in range(len(live))
        ] + after

    @property
    def keeps_ended(self) -> bool:
        """Where the order is free: whether anybody is to read branches that have ended."""
        return self.reduction is not None or bool(self.decoding.reads_all.any())

    def blocks(self) -> int:
        """All that it can ever fill."""
        return sum(map(blocks_for, [self.trunk_tokens(), *self.branch_tokens()]))

    def stored(self) -> SequenceBlocks:
        assert self.storage is not None, "only what has been admitted is fed"
        return self.storage

    @property
    def talking(self) -> bool:
        """Whether some branch has read its prompt."""
        state = self.decoding
        return bool((state.live & (state.fed >= state.known)).any())
