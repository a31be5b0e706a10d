"""Decode all branches of a sample in one sequence: read the prompt once, then one forward pass per step for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.decoding.cache import BranchCache
from parallelmind.decoding.sampling import SamplingParams, generators, processors, sample
from parallelmind.decoding.sequence import Decoding, Feed
from parallelmind.errors import UserError
from parallelmind.layout import MAIN, Ints, Tokens, is_free_order
from parallelmind.model.mask import attention_masks
from parallelmind.model.patch import is_patched, rope_config

Model = PreTrainedModel | PeftModel

# What an unpatched model does anyway, where there is one branch.
_PLAIN = RopeConfig(patch_rope=False, rope_2d_ratio=0, visibility="isolated", positions="time")


class Engine:
    """The tensors behind a `Decoding`: the model, its cache, and the draw of the next tokens."""

    def __init__(self, model: Model, tokens: Tokens, params: SamplingParams) -> None:
        patched = is_patched(model)
        self.config = rope_config(model) if patched else _PLAIN
        _check_ids(model, tokens)
        _check_context(model, tokens, self.config, params)
        self.state = Decoding(tokens, self.config)
        self._model, self._patched = model, patched
        self._cache = BranchCache()
        self._processors = processors(params)
        self._generators = generators(params, tokens.branches)
        self._started = False
        self._parts = is_free_order(self.config) and not tokens.lengths[MAIN] and tokens.branches > 1
        self._rows = np.zeros(0, dtype=np.int64)  # the branch in each row of the cache, once they have parted

    def advance(self) -> tuple[Ints, Ints]:
        """One forward pass; returns the branches that have got a token, and these tokens, `[sampled]` each."""
        feed = self.state.step() if self._started else self.state.prefill()
        logits = self.forward(feed)
        if self._parts and not self._started:
            self._part(feed)
        self._started = True
        ids = self._draw(logits, feed.sampled)
        self.state.accept(feed.sampled, ids)
        return feed.sampled, ids

    @torch.inference_mode()
    def forward(self, feed: Feed) -> Tensor:
        """`[sampled, vocab]` logits after the rows of the feed that ask for them; all of the feed enters the cache."""
        device = self._model.device
        columns = torch.from_numpy(np.stack([feed.ids, feed.sequence, feed.branch, feed.time, feed.position])).to(device)
        if len(self._rows):
            self._keep(feed.sequence - 1)
        ids, sequence, branch, time, position = columns[..., None] if len(self._rows) else columns[:, None]
        where = self._cache.note(time, sequence)
        inputs: dict[str, Any] = {
            "input_ids": ids,  # [1, tokens], or [live branches, 1] once they have parted
            "attention_mask": attention_masks(self._model, *where, self.config.visibility, queries=ids.shape[1]),
            "position_ids": position,
            "past_key_values": self._cache,
            "use_cache": True,
            "logits_to_keep": 1 if len(self._rows) else torch.from_numpy(feed.rows).to(device),
        }
        if self._patched:
            inputs["pos2d"] = torch.stack([branch, time], dim=-1)  # [batch, tokens, 2]
        logits: Tensor = self._model(**inputs).logits
        return logits.flatten(0, 1)

    def _part(self, prompt: Feed) -> None:
        """Branches stand one after another in the prompt; each moves to the right end of a row of its own."""
        self._rows, lengths = np.arange(len(prompt.rows)), np.diff(prompt.rows, prepend=-1)
        places = prompt.rows[:, None] - np.arange(lengths.max())[::-1]
        places[places <= (prompt.rows - lengths)[:, None]] = -1
        self._cache.part(torch.from_numpy(places).to(self._model.device))

    def _keep(self, branches: Ints) -> None:
        """Drop the rows of branches that have ended."""
        if len(branches) < len(self._rows):
            rows = np.searchsorted(self._rows, branches)
            self._rows = self._rows[rows]
            self._cache.keep(torch.from_numpy(rows).to(self._model.device))

    @torch.inference_mode()
    def _draw(self, logits: Tensor, branches: Ints) -> Ints:
        history = torch.from_numpy(self.state.history(branches)).to(logits.device) if self._processors and len(branches) else None
        draws = [self._generators[branch] for branch in branches] if self._generators else []
        return sample(logits, self._processors, history, draws).cpu().numpy()


def _check_ids(model: Model, tokens: Tokens) -> None:
    embeddings: Any = model.get_input_embeddings()
    size = len(embeddings.weight)
    wrong = tokens.ids[(tokens.ids < 0) | (tokens.ids >= size)]
    if len(wrong):
        raise UserError(f"token id {wrong[0]}: the model knows 0..{size - 1}; encode the sample with the model's own tokenizer")


def _check_context(model: Model, tokens: Tokens, config: RopeConfig, params: SamplingParams) -> None:
    """Refuse what would run past the positions that the model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1  # -1: as long as one likes
    flat = config.positions == "flat"
    prompt = int(tokens.lengths.sum() if flat else tokens.lengths[MAIN] + tokens.lengths[1:].max())
    new = params.max_new_tokens * (tokens.branches if flat else 1)
    if 0 <= limit < prompt + new:
        raise UserError(
            f"max_new_tokens={params.max_new_tokens}: {prompt} prompt tokens and {new} new ones exceed "
            f"the model's {limit} positions; shorten the sample or lower max_new_tokens"
        )
