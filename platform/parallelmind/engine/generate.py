"""Generating text: every branch of a sample, streamed or whole, by an engine of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.engine import Engine
from parallelmind.engine.model_runner import Model
from parallelmind.engine.output import Event
from parallelmind.engine.request import Sample, Text, TokenizedRequest
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.tokenization import tokenize_request
from parallelmind.errors import UserNotice
from parallelmind.model.structure import causal_lm


def stream(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    *,
    per_branch: Sequence[dict[str, Any]] | None = None,
    reduce: Text | None = None,
    **sampling: Any,
) -> Iterator[Event]:
    """Decode and yield every branch's text as it comes.

    sampling: fields of `SamplingParams`; per_branch: other values of them for each branch. reduce: the prompt
    of one more branch, the last, which follows when all others have ended and reads main and all of them.
    Raises UserError, before any computing, for a bad setting, an empty branch, an unpatched model with
    several branches, and a sample that the model's context cannot hold. A model that no patch can teach
    parallel branches decodes them isolated, one row each, and a warning says so. Closing the iterator early
    ends the work.
    """
    return _events(
        engine_for(model, tokenizer, [tokenize_request(tokenizer, sample, per_branch, reduce, sampling)])
    )


def engine_for(model: Model, tokenizer: PreTrainedTokenizerBase, asked: Sequence[TokenizedRequest]) -> Engine:
    """An engine with room for these samples, which wait in it, numbered from 0. Errors and warning are those
    of `stream`.
    """
    engine = Engine(model, tokenizer, _config_for(asked))
    if engine.fallback_reason and any(each.tokens.branches > 1 for each in asked):
        kind = causal_lm(model).config.model_type
        said = f"{kind} {engine.fallback_reason}; its branches are decoded isolated, each in a row of its own"
        warnings.warn(said, UserNotice, stacklevel=3)
    for each in asked:
        engine.enqueue(each)
    return engine


def _config_for(requests: Sequence[TokenizedRequest]) -> EngineConfig:
    """Limits that hold these requests side by side, and no more."""
    branches = sum(request.num_branches for request in requests)
    tokens = sum(request.num_prompt_tokens + request.max_new_tokens for request in requests)
    blocks = branches + len(requests)  # every branch and every main may fill a block in part
    return EngineConfig(tokens + BLOCK * blocks, max_branches=branches)


def generate(model: Model, tokenizer: PreTrainedTokenizerBase, sample: Sample, **settings: Any) -> list[str]:
    """The continuation of every branch, without its prompt. Settings and errors are those of `stream`."""
    texts: list[list[str]] = [[] for _ in range(len(sample.branches) + (settings.get("reduce") is not None))]
    for event in stream(model, tokenizer, sample, **settings):
        texts[event.branch].append(event.text)
    return ["".join(pieces) for pieces in texts]


def generate_text(model: Model, tokenizer: PreTrainedTokenizerBase, text: Text, **settings: Any) -> str:
    """The continuation of one text. Settings and errors are those of `stream`."""
    return generate(model, tokenizer, Sample(branches=[text]), **settings)[0]


def _events(engine: Engine) -> Iterator[Event]:
    while engine.busy:
        yield from engine.step()
