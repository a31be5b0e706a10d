"""Generate text for one sample: every branch, streamed or complete, by an engine of its own."""

from __future__ import annotations

import warnings
from collections import defaultdict
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
    """Decode a sample and yield the text of every branch in pieces, as soon as they are decoded.

    An event names its segment by the index in pre-order, counted from the first branch: that of
    `Sample.walk`. A branch of a branch starts when its parent has ended.
    per_branch: settings of each branch of main, which override `sampling`.
    reduce: the reduce of main, for a sample without one: it starts when all others have finished and attends
        to main and all of them.
    sampling: fields of `SamplingParams`.
    Raises UserError, before anything is computed, for a bad setting, an empty branch, several branches on an
    unpatched model, and a sample that exceeds the model's context. A model that cannot hold branches in one
    sequence decodes each isolated, in a row of its own, with a UserNotice. Closing the iterator stops
    decoding.
    """
    request = tokenize_request(tokenizer, sample, per_branch, reduce, sampling)
    return _events(engine_for(model, tokenizer, [request]))


def generate(model: Model, tokenizer: PreTrainedTokenizerBase, sample: Sample, **settings: Any) -> list[str]:
    """The continuation of every segment after main in pre-order, without its prompt.

    Settings and errors are those of `stream`. Raises DecodingError for a branch that ends with an error.
    """
    texts = defaultdict[int, list[str]](list)
    for event in stream(model, tokenizer, sample, **settings):
        event.raise_error()
        texts[event.branch].append(event.text)
    return ["".join(texts[index]) for index in range(len(texts))]


def generate_text(model: Model, tokenizer: PreTrainedTokenizerBase, text: Text, **settings: Any) -> str:
    """The continuation of one text. Settings and errors are those of `stream`."""
    return generate(model, tokenizer, Sample(branches=[text]), **settings)[0]


def engine_for(
    model: Model, tokenizer: PreTrainedTokenizerBase, requests: Sequence[TokenizedRequest]
) -> Engine:
    """An engine that holds exactly these requests, queued, with ids from 0. Raises and warns as `stream`."""
    engine = Engine(model, tokenizer, _config_for(requests))
    if any(request.num_branches > 1 for request in requests):
        warn_if_fallback(engine)
    for request in requests:
        engine.enqueue(request)
    return engine


def warn_if_fallback(engine: Engine) -> None:
    """Warn with a UserNotice if the engine cannot decode several branches in one sequence."""
    if engine.fallback_reason:
        model_type = causal_lm(engine.model).config.model_type
        notice = (
            f"{model_type} {engine.fallback_reason}; each branch is decoded isolated, in a row of its own"
        )
        warnings.warn(notice, UserNotice, stacklevel=4)


def _config_for(requests: Sequence[TokenizedRequest]) -> EngineConfig:
    """Limits that are just large enough to decode these requests at the same time."""
    branches = sum(request.num_branches for request in requests)
    tokens = sum(request.num_prompt_tokens + request.max_new_tokens for request in requests)
    partial_blocks = branches + len(requests)  # the last block of every branch and of every main
    return EngineConfig(cache_tokens=tokens + BLOCK * partial_blocks, max_branches=branches)


def _events(engine: Engine) -> Iterator[Event]:
    while engine.busy:
        yield from engine.step()
