"""Samples from text to token ids, exactly as training tokenizes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import index
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from parallelmind.data.encode import append_eos, encode_text, eos_ids, turn_end_id
from parallelmind.engine.fork_parser import ForkSyntax
from parallelmind.engine.model_runner import Model
from parallelmind.engine.request import (
    PlacedSegment,
    Sample,
    Segment,
    Text,
    TokenizedRequest,
    is_list,
)
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.sequence import BranchState
from parallelmind.errors import UserError, first_line, short_repr
from parallelmind.fork_markers import ForkMarkers
from parallelmind.layout import Tokens
from parallelmind.tree import MAIN, NO_PARENT, Tree


def tokenize_request(
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    per_branch: Sequence[dict[str, Any]] | None,
    reduce: Text | None,
    sampling: dict[str, Any],
) -> TokenizedRequest:
    """Tokenize a sample and resolve its sampling settings; arguments are those of `Engine.submit`.

    Raises UserError for a bad setting, for an empty segment, for a second reduce, for documents without one,
    and if nothing would be decoded.
    """
    if reduce is not None:
        if sample.reduce is not None:
            raise UserError(f"reduce={short_repr(reduce)}: the sample has a reduce; give one of them")
        sample = replace(sample, reduce=reduce)
    if len(sample.documents) and sample.reduce is None:
        raise UserError("documents: nothing reads them; give the question as reduce")
    params = _all_params(sample, sampling, per_branch)
    request = TokenizedRequest(tokenize_sample(tokenizer, sample), params)
    _check_decodes(request)
    return request


def tokenize_branches(
    tokenizer: PreTrainedTokenizerBase, branches: Sequence[Text | Segment], sampling: dict[str, Any]
) -> TokenizedRequest:
    """Tokenize branches that continue a segment of a running sample: a request without main.

    Raises UserError for a bad setting, for no branch and for an empty segment.
    """
    sample = Sample(branches=branches)
    tokens = _tokenize_segments(tokenizer, [], sample, opens=False)
    return TokenizedRequest(tokens, _all_params(sample, sampling, None))


def fork_syntax(markers: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> ForkSyntax | None:
    """How a model with these markers writes a fork; None without markers."""
    own = ForkMarkers.of(markers)
    if own is None:
        return None
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    special = {added[marker]: marker for marker in own if marker in added}
    return ForkSyntax(own, special, tuple(encode_text(tokenizer, own.join, first=False)))


def fork_request(
    tokenizer: PreTrainedTokenizerBase, titles: Sequence[str], join_ids: Sequence[int], branch: BranchState
) -> TokenizedRequest | None:
    """The branches of a fork that a branch has written, and their reduce: a request without main.

    The branches share half of the tokens that the branch may still decode, the reduce has the other half.
    None if this leaves a branch without a token, or a title has none.
    """
    share = branch.output.num_left // 2 // len(titles)
    prompts = [encode_text(tokenizer, title, first=False) for title in titles]
    if not share or not all(prompts):
        return None
    params = replace(branch.params, prompt_logprobs=None)
    own = replace(params, max_new_tokens=share, max_fork_depth=params.max_fork_depth - 1)
    last = replace(params, max_new_tokens=branch.output.num_left - share * len(titles))
    tokens = Tokens.of_tree([[], *prompts, list(join_ids)], Tree.flat(len(titles), has_reduce=True))
    return TokenizedRequest(tokens, [*[own] * len(titles), last])


def _check_decodes(request: TokenizedRequest) -> None:
    """Raise UserError for a request that decodes nothing, and for a last reduce that does not."""
    tree = request.tokens.tree
    for number in np.flatnonzero(tree.is_reduce).tolist():
        if not request.params[number - 1].max_new_tokens and number not in tree.parents:
            raise UserError(
                "max_new_tokens=0: the reduce branch decodes nothing; raise it, or leave reduce out"
            )
    if not request.max_new_tokens:
        raise UserError("max_new_tokens=0: no branch decodes; raise it for one of them, or give a reduce")


def tokenize_sample(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> Tokens:
    """Token ids of a sample. Raises UserError if it has no branch, or an empty one."""
    has_main = sample.main is not None and not (isinstance(sample.main, str) and not sample.main)
    main = tokenize(tokenizer, sample.main, first=True) if has_main else []
    return _tokenize_segments(tokenizer, main, sample, opens=not main)


def _tokenize_segments(
    tokenizer: PreTrainedTokenizerBase, main: list[int], sample: Sample, opens: bool
) -> Tokens:
    """Token ids of main and of what follows it. opens: whether the branches of main open the sample."""
    segments, parents, is_reduce = [main], [NO_PARENT], [False]
    for placed in sample.walk():
        first = opens and placed.parent == MAIN and not placed.is_reduce
        ids = tokenize(tokenizer, placed.segment.text, first)
        is_document = placed.number <= len(sample.documents)
        ends = ids and is_document and isinstance(placed.segment.text, str)
        segments.append(append_eos(ids, eos_ids(tokenizer)) if ends else ids)
        parents.append(placed.parent)
        is_reduce.append(placed.is_reduce)
        if not segments[-1]:
            remedy = "leave it out" if placed.is_reduce or is_document else "move the end of main into it"
            raise UserError(f"{placed.place}: holds no token; give it text, or {remedy}")
    if len(segments) == 1:
        raise UserError("branches=[]: a sample needs at least one branch")
    tree = Tree(np.array(parents), np.array(is_reduce), len(sample.documents))
    return Tokens.of_tree(segments, tree)


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


def _all_params(
    sample: Sample, sampling: dict[str, Any], per_branch: Sequence[dict[str, Any]] | None
) -> list[SamplingParams]:
    """Sampling parameters of every segment: `sampling`, `per_branch` and its own settings, the last wins.

    A document, which is only read, has its own alone.
    """
    own = iter(_checked_settings(per_branch, len(sample.branches)))
    return [
        SamplingParams.of(
            {
                **(sampling if placed.number > len(sample.documents) else {}),
                **(next(own) if _is_branch_of_main(placed, sample) else {}),
                **placed.segment.sampling,
            }
        )
        for placed in sample.walk()
    ]


def _is_branch_of_main(placed: PlacedSegment, sample: Sample) -> bool:
    """Whether a segment is one of `sample.branches`."""
    return placed.parent == MAIN and not placed.is_reduce and placed.number > len(sample.documents)


def _checked_settings(
    per_branch: Sequence[dict[str, Any]] | None, branches: int
) -> Sequence[Mapping[str, Any]]:
    """The settings of each branch of main. Raises UserError if they are not a list of as many dicts."""
    if per_branch is None:
        return [{}] * branches
    if not is_list(per_branch) or not all(isinstance(own, Mapping) for own in per_branch):
        raise UserError(f"per_branch={short_repr(per_branch)}: give a list of dicts, one per branch")
    if len(per_branch) != branches:
        raise UserError(
            f"per_branch: {len(per_branch)} settings for {branches} branches; "
            "give one dict per branch, {} for none"
        )
    return per_branch
