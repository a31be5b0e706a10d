"""Run models that cannot hold branches in one sequence: a row, and a state of its own, for each branch.

The model's state after main (keys and values, or a recurrent state) is computed once and copied for every
branch. Branches are isolated; the price is one forward pass for each branch and step.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallelmind.engine.block_table import BlockTables
from parallelmind.engine.model_runner import Model
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.sequence import BranchState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.engine.step_plan import ForwardPlan, ScheduledGroup
from parallelmind.errors import UserError
from parallelmind.model.hf_compat import is_stateful
from parallelmind.model.structure import causal_lm, eval_mode
from parallelmind.tree import MAIN, Ints

# Names under which the forward methods of transformers take and return their state.
_STATE_NAMES = ("past_key_values", "cache_params", "state")

_CACHE_TOKENS = 1 << 16  # for admission only: the runner does not know the size of a state


class SequentialRunner:
    """One forward pass for each branch, which attends to main and to itself.

    Runs any causal LM whose state can be copied.
    """

    one_sample_per_forward = True  # so that an error ends one sample
    batches_adapters = computes_ahead = has_long_frequencies = False
    frequency_limit = None  # the model computes a branch in a sequence of its own

    def __init__(self, model: Model) -> None:
        self.model = model
        inner = causal_lm(model)
        parameters = inspect.signature(type(inner).forward).parameters
        names = [name for name in _STATE_NAMES if name in parameters]
        if not names:
            raise UserError(
                f"base_model: {inner.config.model_type} keeps no state between forward passes; "
                "choose another model"
            )
        self._state_name, self._is_recurrent = names[0], is_stateful(inner)
        self._states: dict[SequenceGroup, dict[int, Any]] = {}  # by segment number, main included

    def set_model(self, model: Model) -> None:
        """Set the model again after an adapter was added or removed."""
        self.model = model

    def warm_up(self, always: bool, tables: BlockTables) -> bool:
        """Do nothing: there is no pass of a fixed form to compile."""
        return False

    def resolve_config(self, config: EngineConfig | None, num_engines: int) -> EngineConfig:
        """`config` or a default, with unlimited prefill: recurrent models need prompts in one piece."""
        config = config or EngineConfig(cache_tokens=_CACHE_TOKENS)
        return replace(config, max_prefill_tokens=config.cache_tokens, prefill_share=1)

    def prepare_inputs(self, forward: ForwardPlan, tables: BlockTables) -> Sequence[ScheduledGroup]:
        """Return the scheduled tokens as they are: each segment has a state of its own."""
        return forward.each()

    @torch.inference_mode()
    def __call__(
        self, scheduled: Sequence[ScheduledGroup], ids: Tensor | None = None, greedy: bool = False
    ) -> Tensor:
        """`[sampled + labels, vocab]` logits, in the order of `ModelInput.logits_indices`.

        ids: not used, because it does not compute ahead.
        """
        sampled, before_labels = list[Tensor](), list[Tensor]()
        for group, tokens, *_ in scheduled:
            states, logits = self._states.setdefault(group, {}), dict[int, Tensor]()
            needed = {*tokens.logits_indices.tolist(), *tokens.labels.logits_indices.tolist()}
            try:
                for segment in sorted(set(tokens.segment.tolist())):
                    where = np.flatnonzero(tokens.segment == segment).tolist()
                    is_needed = [index in needed for index in where]
                    rows = self._forward(states, segment, tokens.ids[where], is_needed)
                    logits |= zip(compress(where, is_needed), rows, strict=True)
            finally:
                for branch in group.branches:
                    if not branch.is_running:  # it may have been cancelled since it was scheduled
                        self.free(group, branch)
            sampled += map(logits.__getitem__, tokens.logits_indices.tolist())
            before_labels += map(logits.__getitem__, tokens.labels.logits_indices.tolist())
        needed_logits = [*sampled, *before_labels]
        return torch.stack(needed_logits) if needed_logits else torch.empty(0, 1)

    def _forward(self, states: dict[int, Any], segment: int, ids: Ints, is_needed: list[bool]) -> Tensor:
        """`[needed, vocab]` logits after some of these tokens; updates the state of the segment."""
        state = states.get(segment)
        state = deepcopy(states.get(MAIN)) if state is None else state
        # Some recurrent models scan several tokens from the beginning only: continue token by token.
        one_by_one = self._is_recurrent and state is not None
        row, logits = torch.from_numpy(ids)[None].to(self.model.device), list[Tensor]()
        with eval_mode(self.model):
            size = 1 if one_by_one else len(ids)
            for chunk, needed in zip(
                row.split(size, dim=1), torch.tensor(is_needed).split(size), strict=True
            ):
                out = self.model(input_ids=chunk, use_cache=True, **{self._state_name: state})
                state = getattr(out, self._state_name)
                logits.append(out.logits[0, needed.to(out.logits.device)])
        states[segment] = state
        return torch.cat(logits)

    def free(self, group: SequenceGroup, branch: BranchState) -> None:
        """Delete the state of a finished branch, and that of main after the last one."""
        self._states.get(group, {}).pop(branch.index + 1, None)
        if not group.is_running:
            self._states.pop(group, None)

    def forget(self, group: SequenceGroup) -> None:
        """Delete all states of a preempted sample, which is computed anew."""
        self._states.pop(group, None)
