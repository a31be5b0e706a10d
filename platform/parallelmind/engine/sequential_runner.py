"""The fallback for models that cannot hold branches in one sequence: a row and a memory of its own for each
branch.

Whatever a model remembers of main, be it keys and values or a recurrent state, is computed once and copied
for every branch. What each branch then says is what it says alone; the price is one forward pass per branch
and step.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallelmind.config import RopeConfig
from parallelmind.engine.model_runner import Model, Part
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.sequence_group import Running
from parallelmind.errors import UserError
from parallelmind.layout import MAIN, Ints
from parallelmind.model.hf_compat import is_stateful
from parallelmind.model.structure import causal_lm

_MEMORIES = (
    "past_key_values",
    "cache_params",
    "state",
)  # what a forward pass calls the memory that it takes and returns

_TOKENS = 1 << 16


class SequentialRunner:
    """One forward pass for each isolated branch, which sees main and itself, on any causal LM whose memory
    can be copied.
    """

    alone = False

    def __init__(self, model: Model) -> None:
        self.model = model
        inner = causal_lm(model)
        known = inspect.signature(type(inner).forward).parameters
        names = [name for name in _MEMORIES if name in known]
        if not names:
            kind = inner.config.model_type
            raise UserError(
                f"base_model: {kind} remembers nothing between forward passes; choose another model"
            )
        self._memory_name, self._stateful = names[0], is_stateful(inner)
        self._memories: dict[Running, dict[int, Any]] = {}  # of each sequence of a sample

    def use(self, model: Model) -> None:
        """The same model, once an adapter has been put on it or taken off."""
        self.model = model

    def limited(self, limits: EngineConfig | None, config: RopeConfig, engines: int) -> EngineConfig:
        """With a number to count by if none is given: what a memory takes is the model's own affair."""
        limits = limits or EngineConfig(cache_tokens=_TOKENS)
        return replace(
            limits, max_prefill_tokens=limits.cache_tokens
        )  # a recurrence reads a prompt at once, or token by token

    def enter(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Nothing to prepare: each sequence keeps a memory of its own."""
        return parts

    @torch.inference_mode()
    def __call__(self, parts: Sequence[Part]) -> Tensor:
        """`[sampled, vocab]` logits after the newest token of each branch that asks, sample by sample."""
        logits = []
        for entry, feed in parts:
            memories, last = self._memories.setdefault(entry, {}), {}
            for sequence in sorted(set(feed.sequence.tolist())):
                last[sequence - 1] = self._read(memories, sequence, feed.ids[feed.sequence == sequence])
            logits += [last[branch] for branch in feed.sampled.tolist()]
            for branch in np.flatnonzero(~entry.decoding.live).tolist():
                self.forget(entry, branch)  # it may have ended meanwhile
        return torch.stack(logits) if logits else torch.empty(0, 1)

    def _read(self, memories: dict[int, Any], sequence: int, ids: Ints) -> Tensor:
        """`[vocab]` logits after the last of these tokens; the sequence's memory holds them from now on."""
        memory = memories.get(sequence)
        memory = deepcopy(memories.get(MAIN)) if memory is None else memory
        # A recurrence that has begun goes on by one token: some models scan several from the beginning only.
        one_by_one = self._stateful and memory is not None
        for part in (
            torch.from_numpy(ids)[None].to(self.model.device).split(1 if one_by_one else len(ids), dim=1)
        ):
            out = self.model(input_ids=part, use_cache=True, **{self._memory_name: memory})
            memory = getattr(out, self._memory_name)
        memories[sequence] = memory
        logits: Tensor = out.logits[0, -1]
        return logits

    def forget(self, entry: Running, branch: int) -> None:
        """A branch has ended: so does its memory, and with the last one that of main."""
        memories = self._memories.get(entry, {})
        memories.pop(branch + 1, None)
        if entry.decoding.done:
            self._memories.pop(entry, None)
