"""Samples from text to token ids, exactly as training tokenizes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from parallelmind.data.encode import encode_text, turn_end_id
from parallelmind.engine.model_runner import Model
from parallelmind.engine.request import ReduceSpec, Sample, Text, TokenizedRequest, is_list
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.errors import UserError, first_line, short_repr
from parallelmind.layout import Tokens


def tokenize_request(
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    per_branch: Sequence[dict[str, Any]] | None,
    reduce: Text | None,
    sampling: dict[str, Any],
) -> TokenizedRequest:
    """Tokenize a sample and resolve its sampling settings; arguments are those of `Engine.submit`.

    Raises UserError for a bad setting, for an empty branch, and if nothing would be decoded.
    """
    tokens = tokenize_sample(tokenizer, sample)
    params = _branch_params(sampling, per_branch, tokens.branches)
    spec = None
    if reduce is not None:
        spec = ReduceSpec(tokenize(tokenizer, reduce, first=False), SamplingParams.of(sampling))
    request = TokenizedRequest(tokens, params, spec)
    _check_decodes(request)
    return request


def _check_decodes(request: TokenizedRequest) -> None:
    """Raise UserError for a request that decodes nothing, and for a reduce branch that does not."""
    reduce = request.reduce
    if reduce and not reduce.params.max_new_tokens:
        raise UserError("max_new_tokens=0: the reduce branch decodes nothing; raise it, or leave reduce out")
    if not request.max_new_tokens:
        raise UserError("max_new_tokens=0: no branch decodes; raise it for one of them, or give a reduce")


def tokenize_sample(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Tokens:
    """Token ids of a sample. Raises UserError if it has no branch, or an empty one."""
    has_main = sample.main is not None and not (isinstance(sample.main, str) and not sample.main)
    main = tokenize(tokenizer, sample.main, first=True) if has_main else []
    return Tokens.of(main, [tokenize(tokenizer, branch, first=not main) for branch in sample.branches])


def tokenize(tokenizer: PreTrainedTokenizerBase, text: Text, first: bool) -> list[int]:
    """Token ids of one text. Token ids, also those of an array or a tensor, are returned as they are.

    first: whether the text opens the sample, and so begins with BOS where the tokenizer adds one.
    Raises UserError for what is neither text nor token ids.
    """
    if isinstance(text, str):
        _check_characters(text)
        return encode_text(tokenizer, text, first)
    try:
        return np.array(_token_ids(text), dtype=np.int64).tolist()
    except (TypeError, OverflowError) as error:
        raise UserError(
            f"tokens={short_repr(text)}: give text, or a list of token ids ({first_line(error)})"
        ) from error


def _check_characters(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text={short_repr(text)}: holds half of a surrogate pair, which is not a character; remove it"
        ) from error


def _token_ids(tokens: Any) -> list[int]:
    """The ids in a list or an array. Raises TypeError for anything else, masks of truth values included."""
    if not is_list(tokens):
        raise TypeError(f"{type(tokens).__name__!r} is not a list")
    ids = tokens.tolist() if hasattr(tokens, "tolist") else tokens
    if any(isinstance(token, bool) for token in ids):
        raise TypeError("truth values are not ids")
    return [index(token) for token in ids]


def eos_token_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Token ids that end a text, from the model's generation config, the tokenizer and its chat template."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, (list, tuple)) else [configured]
    all_ids = (*ids, tokenizer.eos_token_id, turn_end_id(tokenizer))
    return frozenset(int(token) for token in all_ids if token is not None)


def _branch_params(
    sampling: dict[str, Any], per_branch: Sequence[dict[str, Any]] | None, branches: int
) -> list[SamplingParams]:
    """Sampling parameters of every branch: `per_branch` overrides `sampling`."""
    if per_branch is None:
        return [SamplingParams.of(sampling)] * branches
    if not is_list(per_branch) or not all(isinstance(own, Mapping) for own in per_branch):
        raise UserError(f"per_branch={short_repr(per_branch)}: give a list of dicts, one per branch")
    if len(per_branch) != branches:
        raise UserError(
            f"per_branch: {len(per_branch)} settings for {branches} branches; "
            "give one dict per branch, {} for none"
        )
    return [SamplingParams.of({**sampling, **own}) for own in per_branch]
