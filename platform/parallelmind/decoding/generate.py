"""Generating text: every branch of a sample, streamed or whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from parallelmind.data.encode import encode_text
from parallelmind.decoding.engine import Engine, Model
from parallelmind.decoding.rows import RowEngine
from parallelmind.decoding.sampling import SamplingParams
from parallelmind.decoding.sequence import FinishReason
from parallelmind.decoding.text import BranchWriter
from parallelmind.errors import Notice, UserError
from parallelmind.layout import Tokens
from parallelmind.model.patch import is_patched
from parallelmind.model.structure import causal_lm
from parallelmind.model.support import assess

Text = str | Sequence[int]


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
    unpatched model with several branches, and a sample that the model's context cannot hold. A model that no patch can
    teach parallel branches decodes them isolated, one row each, and a warning says so. Closing the iterator early ends the
    work.
    """
    params = SamplingParams.of(sampling)
    tokens = encode_sample(tokenizer, sample)
    engine = _engine(model, tokens, params)
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


def _engine(model: Model, tokens: Tokens, params: SamplingParams) -> Engine:
    if is_patched(model):
        return Engine(model, tokens, params)
    reason = assess(causal_lm(model)).reason
    if reason is None:
        if tokens.branches > 1:
            raise UserError(f"branches: {tokens.branches} given, but the model is not patched; load it with load_model_with_lora")
        return Engine(model, tokens, params)
    engine = RowEngine(model, tokens, params)
    if tokens.branches > 1:
        kind = causal_lm(model).config.model_type
        warnings.warn(f"{kind} {reason}; its branches are decoded isolated, each in a row of its own", Notice, stacklevel=3)
    return engine


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
