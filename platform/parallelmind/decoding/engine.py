"""Decode all branches of a sample in one sequence: read the prompt once, then one forward pass per step for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parallelmind.config import RopeConfig
from parallelmind.data.encode import encode_text
from parallelmind.decoding.cache import BranchCache
from parallelmind.decoding.sampling import SamplingParams, generators, processors, sample
from parallelmind.decoding.sequence import Decoding, Feed, FinishReason
from parallelmind.decoding.text import BranchWriter
from parallelmind.errors import UserError
from parallelmind.layout import MAIN, Ints, Tokens, is_free_order
from parallelmind.model.mask import for_attention, visible
from parallelmind.model.patch import is_patched, rope_config

Model = PreTrainedModel | PeftModel
Text = str | Sequence[int]

# What an unpatched model does anyway, where there is one branch.
_PLAIN = RopeConfig(patch_rope=False, rope_2d_ratio=0, visibility="isolated", positions="time")


@dataclass(frozen=True, slots=True)
class Sample:
    """What to continue: branches that share `main`, which may be empty. Texts, or token ids in their place."""

    main: Text = ""
    branches: Sequence[Text] = ()

    def __post_init__(self) -> None:
        if isinstance(self.branches, str):
            raise UserError(f"branches={self.branches!r}: give a list of texts, one per branch")


@dataclass(frozen=True, slots=True)
class Event:
    """What one decoded token adds to one branch.

    branch: 0..N-1, as in the sample. text: new text to show, often empty while a character or a stop text is incomplete.
    token: the decoded id. finish_reason: set on a branch's last event; stop is an end-of-text token or a stop text.
    """

    branch: int
    text: str
    token: int | None
    finish_reason: FinishReason | None = None


def stream(model: Model, tokenizer: PreTrainedTokenizerBase, sample: Sample, **sampling: Any) -> Iterator[Event]:
    """Decode and yield every branch's text as it comes.

    sampling: fields of `SamplingParams`. Raises UserError, before any computing, for a bad setting, an empty branch, an
    unpatched model with several branches, and a sample that the model's context cannot hold. Closing the iterator early
    ends the work.
    """
    params = SamplingParams.of(sampling)
    tokens = encode_sample(tokenizer, sample)
    engine = Engine(model, tokens, params)
    eos = end_ids(model, tokenizer)
    prompts = np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])[1:]
    writers = [BranchWriter(tokenizer, prompt.tolist(), params, eos) for prompt in prompts]
    return _events(engine, writers)


def generate(model: Model, tokenizer: PreTrainedTokenizerBase, sample: Sample, **sampling: Any) -> list[str]:
    """The continuation of every branch, without its prompt. Settings and errors are those of `stream`."""
    texts: list[list[str]] = [[] for _ in sample.branches]
    for event in stream(model, tokenizer, sample, **sampling):
        texts[event.branch].append(event.text)
    return ["".join(pieces) for pieces in texts]


def generate_text(model: Model, tokenizer: PreTrainedTokenizerBase, text: Text, **sampling: Any) -> str:
    """The continuation of one text. Settings and errors are those of `stream`."""
    return generate(model, tokenizer, Sample(branches=[text]), **sampling)[0]


def encode_sample(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Tokens:
    """Token ids of a sample, as training sees them. Raises UserError if there is no branch or an empty one."""
    main = _encode(tokenizer, sample.main, first=True) if sample.main else []
    return Tokens.of(main, [_encode(tokenizer, branch, first=not main) for branch in sample.branches])


def end_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a text, by the model's generation config and by the tokenizer."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(int(token) for token in (*several, tokenizer.eos_token_id) if token is not None)


class Engine:
    """The tensors behind a `Decoding`: the model, its cache, and the draw of the next tokens."""

    def __init__(self, model: Model, tokens: Tokens, params: SamplingParams) -> None:
        patched = is_patched(model)
        if not patched and tokens.branches > 1:
            raise UserError(f"branches: {tokens.branches} given, but the model is not patched; load it with load_model_with_lora")
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
        seen = visible(*self._cache.note(time, sequence), self.config.visibility, queries=ids.shape[1])
        inputs: dict[str, Any] = {
            "input_ids": ids,  # [1, tokens], or [live branches, 1] once they have parted
            "attention_mask": for_attention(seen, self._model.config._attn_implementation, self._model.dtype),
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


def _events(engine: Engine, writers: Sequence[BranchWriter]) -> Iterator[Event]:
    while not engine.state.done:
        branches, ids = engine.advance()
        for branch, token in zip(branches.tolist(), ids.tolist(), strict=True):
            text, reason = writers[branch].write(token)
            if reason:
                engine.state.finish(branch, reason)
            yield Event(branch, text, token, reason)


def _encode(tokenizer: PreTrainedTokenizerBase, text: Text, first: bool) -> list[int]:
    return encode_text(tokenizer, text, first) if isinstance(text, str) else list(text)


def _check_ids(model: Model, tokens: Tokens) -> None:
    embeddings: Any = model.get_input_embeddings()
    size = len(embeddings.weight)
    wrong = tokens.ids[(tokens.ids < 0) | (tokens.ids >= size)]
    if len(wrong):
        raise UserError(f"token id {wrong[0]}: the model knows 0..{size - 1}; encode the sample with the model's own tokenizer")


def _check_context(model: Model, tokens: Tokens, config: RopeConfig, params: SamplingParams) -> None:
    """Refuse what would run past the positions that the model was made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    flat = config.positions == "flat"
    prompt = int(tokens.lengths.sum() if flat else tokens.lengths[MAIN] + tokens.lengths[1:].max())
    new = params.max_new_tokens * (tokens.branches if flat else 1)
    if limit is not None and prompt + new > limit:
        raise UserError(
            f"max_new_tokens={params.max_new_tokens}: {prompt} prompt tokens and {new} new ones exceed "
            f"the model's {limit} positions; shorten the sample or lower max_new_tokens"
        )
