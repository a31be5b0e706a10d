"""Generate text for prompts: every branch, streamed or complete, by an engine of its own."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from transformers import PreTrainedTokenizerBase

from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.engine import Engine
from parallelmind.engine.linear import linearized
from parallelmind.engine.model_runner import Model
from parallelmind.engine.output import Event
from parallelmind.engine.prompt import GivenPrompt, Prompt, to_prompts
from parallelmind.engine.request import Sample, Text, TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.tokenization import tokenize_request
from parallelmind.errors import UserError, UserNotice, short_repr
from parallelmind.model.fork_markers import fork_markers
from parallelmind.model.structure import causal_lm

_MAX_CACHE_TOKENS = 1 << 15  # for several prompts; those that do not fit wait
_ROUNDS = 4  # forks of the largest size that one segment has room for


def stream(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | None = None,
    *,
    per_branch: Sequence[dict[str, Any]] | None = None,
    reduce: Text | None = None,
    documents: Sequence[Text] = (),
    document_cache: str | Path | None = None,
    **sampling: Any,
) -> Iterator[Event]:
    """Decode a prompt and yield the text of every branch in pieces, as soon as they are decoded.

    An event names its segment by the index in pre-order, counted from the first branch: that of
    `Sample.walk`. A branch of a branch starts when its parent has ended. A model that was trained with
    `fork_markers` may fork by itself: `Event.fork` names the segments that it adds.
    prompt: a text, a sample, or the messages of a chat; or a list of these, which do not read each other:
        `event.sample` is the index in the list.
    sampling_params: settings of all branches. sampling: fields of `SamplingParams`, which override them.
    per_branch: settings of each branch of main, which override both.
    reduce: the reduce of main, for a sample without one: it starts when all others have finished and attends
        to main and all of them.
    documents: texts that are only read, by a prompt that is a text or a chat, or by the reduce of a sample.
        They are the first segments.
    document_cache: folder that keeps their keys and values for later calls and processes.
    Raises UserError, before anything is computed, for a bad setting, an empty branch, several branches on an
    unpatched model, and a sample that exceeds the model's context. A model that cannot hold branches in one
    sequence decodes each isolated, in a row of its own, with a UserNotice. Closing the iterator stops
    decoding.
    """
    prompts, _ = to_prompts(tokenizer, prompt, documents)
    settings = _settings(sampling_params, sampling)
    return _stream(model, tokenizer, prompts, per_branch, reduce, settings, document_cache)


@overload
def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sample,
    sampling_params: SamplingParams | None = None,
    **settings: Any,
) -> list[str]: ...


@overload
def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | None = None,
    **settings: Any,
) -> Any: ...


def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | None = None,
    *,
    per_branch: Sequence[dict[str, Any]] | None = None,
    reduce: Text | None = None,
    documents: Sequence[Text] = (),
    document_cache: str | Path | None = None,
    **sampling: Any,
) -> Any:
    """The continuation of a prompt, without the prompt itself.

    Of a text or a chat it is a text; of a sample a list with the text of every branch and reduce, in
    pre-order; of a list of prompts a list with the continuation of each. A segment that forks by itself is
    one text: what it wrote, every branch after its title, and the reduce. Arguments and errors are those of
    `stream`. Raises DecodingError for a branch that ends with an error.
    """
    prompts, are_several = to_prompts(tokenizer, prompt, documents)
    texts = [defaultdict[int, list[str]](list) for _ in prompts]
    settings = _settings(sampling_params, sampling)
    events = _stream(model, tokenizer, prompts, per_branch, reduce, settings, document_cache)
    for event in linearized(events):
        event.raise_error()
        texts[event.sample][event.branch].append(event.text)
    answers = [_answer(given, pieces) for given, pieces in zip(prompts, texts, strict=True)]
    return answers if are_several else answers[0]


def _answer(given: GivenPrompt, pieces: Mapping[int, list[str]]) -> str | list[str]:
    """The continuations of a prompt, from the pieces of each segment. Documents have none."""
    texts = ["".join(pieces[index]) for index in range(len(given.sample.documents), len(pieces))]
    return texts[0] if given.is_lone and len(texts) == 1 else texts


def generate_text(model: Model, tokenizer: PreTrainedTokenizerBase, text: Text, **settings: Any) -> str:
    """The continuation of one text. Settings and errors are those of `stream`."""
    return generate(model, tokenizer, Sample(branches=[text]), **settings)[0]


def _settings(params: SamplingParams | None, sampling: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all branches. Raises UserError for parameters of another type."""
    if params is None:
        return dict(sampling)
    if not isinstance(params, SamplingParams):
        raise UserError(
            f"sampling_params={short_repr(params)}: give pm.SamplingParams(…); questions about one text are "
            "branches: pm.Sample(main=text, branches=questions)"
        )
    return {**params.settings(), **sampling}


def _stream(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[GivenPrompt],
    per_branch: Sequence[dict[str, Any]] | None,
    reduce: Text | None,
    sampling: dict[str, Any],
    document_cache: str | Path | None,
) -> Iterator[Event]:
    for field, value in (("per_branch", per_branch), ("reduce", reduce)):
        if value is not None and len(prompts) != 1:
            raise UserError(
                f"{field}={short_repr(value)}: {len(prompts)} prompts are given; write it into each as a "
                "pm.Sample with a pm.Segment or a reduce of its own"
            )
    requests = [
        tokenize_request(tokenizer, prompt.sample, per_branch, reduce, sampling) for prompt in prompts
    ]
    return _events(engine_for(model, tokenizer, requests, document_cache)) if requests else iter(())


def engine_for(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[TokenizedRequest],
    document_cache: str | Path | None = None,
) -> Engine:
    """An engine that holds exactly these requests, queued, with ids from 0. Raises and warns as `stream`."""
    config = _config_for(requests, forks=bool(fork_markers(model)))
    engine = Engine(model, tokenizer, config, document_cache=document_cache)
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


def _config_for(requests: Sequence[TokenizedRequest], forks: bool) -> EngineConfig:
    """Limits that are just large enough to decode these requests, as many at a time as is sensible.

    forks: whether the model may fork by itself.
    """
    slots, branches = [], []
    for request in requests:
        num_new, num_branches = request.max_new_tokens, request.num_branches
        if forks:  # a title is read once more than it is written
            num_new *= 2
            num_branches += sum(_ROUNDS * (params.max_fork_branches + 1) for params in request.params)
        # The last block of main and of every branch is not full.
        slots.append(request.num_prompt_tokens + num_new + BLOCK * (num_branches + 1))
        branches.append(num_branches)
    cache_tokens = max(*slots, min(sum(slots), _MAX_CACHE_TOKENS))
    return EngineConfig(cache_tokens=cache_tokens, max_branches=max(branches))


def _events(engine: Engine) -> Iterator[Event]:
    while engine.busy:
        yield from engine.step()
    engine.flush_documents()
