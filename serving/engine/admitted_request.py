"""A request of an engine, and the limits that its sample has to keep as it grows."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import parallelmind as pm
from parallelmind.engine.request import TokenizedRequest
from parallelmind.tree import segment_paths
from serving.config import RequestLimits
from serving.engine.loop import RunningRequest
from serving.engine.messages import EngineRequest, RejectedRequest

Addition = list[tuple[int, str]] | RejectedRequest  # index and path of each segment that a call adds


@dataclass(slots=True)
class AdmittedRequest:
    """A request of this engine.

    samples: as they were submitted.
    additions: the results of calls that add segments, by the keys of their callers.
    lock: held while segments are added.
    """

    running: RunningRequest
    samples: list[TokenizedRequest]
    additions: dict[str, asyncio.Future[Addition]]
    lock: asyncio.Lock

    @classmethod
    def of(cls, running: RunningRequest, request: EngineRequest) -> AdmittedRequest:
        """To be called in the event loop."""
        admitted = cls(running, request.samples, {}, asyncio.Lock())
        for key, indices in request.added.items():
            admitted.additions[key] = asyncio.get_running_loop().create_future()
            admitted.additions[key].set_result(admitted.places(indices))
        return admitted

    def places(self, indices: list[int]) -> list[tuple[int, str]]:
        """Indices of segments of the only sample, each with its path."""
        paths = segment_paths(self._sample().tokens.tree)[1:]
        return [(index, paths[index]) for index in indices]

    @property
    def can_grow(self) -> bool:
        """Whether segments can be added: to the only sample."""
        return len(self.samples) == 1

    def _sample(self) -> TokenizedRequest:
        """The only sample with all segments, also those that were added."""
        (sample,) = self.samples
        for added in self.running.added:
            sample = added.extend(sample)
        return sample

    def require_room(self, added: TokenizedRequest, limits: RequestLimits) -> None:
        """Raise UserError if the only sample would exceed the limits of a new sample."""
        sample = self._sample()
        branches = sample.num_branches + added.num_branches
        if branches > limits.max_branches:
            raise pm.UserError(
                f"branches: {branches} branches with the rest of the sample, {limits.max_branches} allowed; "
                "begin another sample"
            )
        tokens = sample.num_prompt_tokens + added.num_prompt_tokens
        if tokens > limits.max_prompt_tokens:
            raise pm.UserError(
                f"text: {tokens} prompt tokens with the rest of the sample, {limits.max_prompt_tokens} "
                "allowed; shorten it or begin another sample"
            )
