"""The fallback for models that cannot hold branches in one sequence: a row and a memory of its own for each branch.

Whatever a model remembers of main, be it keys and values or a recurrent state, is computed once and copied for every
branch. What each branch then says is what it says alone; the price is one forward pass per branch and step.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallelmind.decoding.engine import Engine, Model
from parallelmind.decoding.sampling import SamplingParams
from parallelmind.decoding.sequence import Feed
from parallelmind.errors import UserError
from parallelmind.layout import MAIN, Ints, Tokens
from parallelmind.model.structure import causal_lm

_MEMORIES = ("past_key_values", "cache_params", "state")  # what a forward pass calls the memory that it takes and returns


class RowEngine(Engine):
    """An engine for isolated branches that see main and themselves, on any causal LM whose memory can be copied."""

    def __init__(self, model: Model, tokens: Tokens, params: SamplingParams) -> None:
        super().__init__(model, tokens, params)
        self._parts = False
        inner = causal_lm(model)
        known = inspect.signature(type(inner).forward).parameters
        names = [name for name in _MEMORIES if name in known]
        if not names:
            kind = inner.config.model_type
            raise UserError(f"base_model: {kind} remembers nothing between forward passes; choose another model")
        self._memory_name, self._stateful = names[0], inner._is_stateful
        self._memories: dict[int, Any] = {}  # by sequence

    @torch.inference_mode()
    def forward(self, feed: Feed) -> Tensor:
        """`[sampled, vocab]` logits after the newest token of each branch in the feed."""
        parts = {int(sequence): feed.ids[feed.sequence == sequence] for sequence in np.unique(feed.sequence)}
        if MAIN in parts:
            self._read(MAIN, parts.pop(MAIN))
        logits = {sequence - 1: self._read(sequence, ids) for sequence, ids in parts.items()}
        return torch.stack([logits[branch] for branch in feed.sampled.tolist()])

    def _read(self, sequence: int, ids: Ints) -> Tensor:
        """`[vocab]` logits after the last of these tokens; the sequence's memory holds them from now on."""
        memory = self._memories[sequence] if sequence in self._memories else deepcopy(self._memories.get(MAIN))
        # A recurrence that has begun goes on by one token: some models scan several from the beginning only.
        one_by_one = self._stateful and memory is not None
        for part in torch.from_numpy(ids)[None].to(self._model.device).split(1 if one_by_one else len(ids), dim=1):
            out = self._model(input_ids=part, use_cache=True, **{self._memory_name: memory})
            memory = getattr(out, self._memory_name)
        self._memories[sequence] = memory
        logits: Tensor = out.logits[0, -1]
        return logits
