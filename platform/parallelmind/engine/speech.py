"""A sample as the engine speaks for it: beside its tokens, what is said of every branch, and by which
settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from parallelmind.engine.output import Event, FinishReason, OutputProcessor
from parallelmind.engine.request import ReduceSpec
from parallelmind.engine.sampler import SampledToken, SamplingRow
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.sequence_group import Running
from parallelmind.layout import branch_coordinates


@dataclass(slots=True)
class Voice:
    """One branch."""

    params: SamplingParams
    seed: int
    writer: OutputProcessor


@dataclass(eq=False, slots=True)
class Speech:
    """All branches of a sample. seed: for those that bring none. reducing: who follows when all have
    ended.
    """

    entry: Running
    seed: int
    reducing: ReduceSpec | None = None
    voices: list[Voice] = field(default_factory=list)

    def add(self, params: SamplingParams, writer: OutputProcessor) -> None:
        self.voices.append(Voice(params, self.seed if params.seed is None else params.seed, writer))

    @property
    def live(self) -> list[int]:
        """Numbers of the branches that go on."""
        found: list[int] = np.flatnonzero(self.entry.decoding.live).tolist()
        return found

    def row(self, branch: int) -> SamplingRow:
        """A branch that is about to get a token."""
        decoding, voice = self.entry.decoding, self.voices[branch]
        return SamplingRow(
            voice.params, voice.seed, branch, len(decoding.generated(branch)), decoding.history(branch)
        )

    def say(self, branch: int, choice: SampledToken) -> Event:
        """A branch has got its token."""
        place = self.place(branch, len(self.entry.decoding.history(branch)))
        self.entry.decoding.accept(np.array([branch]), np.array([choice.token]))
        text, reason = self.voices[branch].writer.write(choice.token)
        return Event(branch, text, choice.token, reason, choice.logprob, choice.top, self.entry.number, place)

    def has_said(self, branch: int, ids: Sequence[int]) -> None:
        """A branch has got these tokens elsewhere, and has told them."""
        self.entry.decoding.has_said(branch, ids)
        for token in ids:
            self.voices[branch].writer.write(token)

    def cancelled(self, branch: int) -> Event:
        reason: FinishReason = "cancelled"
        return Event(branch, "", None, reason, sample=self.entry.number)

    def places(self) -> list[tuple[int, int]]:
        """Of every branch's first token."""
        return [self.place(branch) for branch in range(len(self.voices))]

    def place(self, branch: int, index: int = 0) -> tuple[int, int]:
        """The branch and time coordinates of a branch's token, counted from its prompt's first."""
        decoding = self.entry.decoding
        sequence = branch_coordinates(
            np.array(branch + 1), len(decoding.main) > 0, decoding.config.branch_stride
        )
        return int(sequence), int(decoding.starts[branch]) + index
