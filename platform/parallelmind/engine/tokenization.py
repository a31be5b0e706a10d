"""Samples from text to token ids, exactly as training tokenizes them."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from reprlib import repr as short
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from parallelmind.data.encode import encode_text, turn_end_id
from parallelmind.engine.model_runner import Model
from parallelmind.engine.request import ReduceSpec, Sample, Text, TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.errors import UserError, first_line
from parallelmind.layout import Tokens


def tokenize_request(
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    per_branch: Sequence[dict[str, Any]] | None,
    reduce: Text | None,
    sampling: dict[str, Any],
) -> TokenizedRequest:
    """Tokenize a sample and resolve its sampling settings; arguments are those of `Engine.submit`.

    Raises UserError for a bad setting, and for an empty branch.
    """
    tokens = tokenize_sample(tokenizer, sample)
    params = _branch_params(sampling, per_branch, tokens.branches)
    if reduce is None:
        return TokenizedRequest(tokens, params)
    reduce_ids = tokenize(tokenizer, reduce, first=False)
    return TokenizedRequest(tokens, params, ReduceSpec(reduce_ids, SamplingParams.of(sampling)))


def tokenize_sample(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Tokens:
    """Token ids of a sample. Raises UserError if it has no branch, or an empty one."""
    has_main = sample.main is not None and len(sample.main) > 0
    main = tokenize(tokenizer, sample.main, first=True) if has_main else []
    return Tokens.of(main, [tokenize(tokenizer, branch, first=not main) for branch in sample.branches])


def tokenize(tokenizer: PreTrainedTokenizerBase, text: Text, first: bool) -> list[int]:
    """Token ids of one text. Token ids, also those of an array or a tensor, are returned as they are.

    first: whether the text opens the sample, and so begins with BOS where the tokenizer adds one.
    Raises UserError for what is neither text nor token ids.
    """
    if isinstance(text, str):
        return encode_text(tokenizer, text, first)
    try:
        ids = text.tolist() if hasattr(text, "tolist") else text
        return np.array([index(token) for token in ids], dtype=np.int64).tolist()
    except (TypeError, OverflowError) as error:
        shown = " ".join(short(text).split())
        raise UserError(f"tokens={shown}: give text, or a list of token ids ({first_line(error)})") from error


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
    if len(per_branch) != branches:
        raise UserError(
            f"per_branch: {len(per_branch)} settings for {branches} branches; "
            "give one dict per branch, {} for none"
        )
    return [SamplingParams.of({**sampling, **own}) for own in per_branch]
