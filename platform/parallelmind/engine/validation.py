"""Check a request against the model before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from parallelmind.config import RopeConfig
from parallelmind.engine.model_runner import Model
from parallelmind.engine.request import TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.errors import UserError
from parallelmind.layout import start_times
from parallelmind.model.patch_state import is_patched


def check_request(
    model: Model, config: RopeConfig, request: TokenizedRequest, fallback_reason: str | None
) -> None:
    """Raise UserError for unknown token ids, unsupported branches, and more tokens than the context holds.

    fallback_reason: why the model's branches cannot share a sequence; None if they can.
    """
    tokens, reduce = request.tokens, request.reduce
    check_token_ids(model, tokens.ids.tolist(), request.params)
    if request.num_branches > 1:
        _check_patched(model, f"{tokens.branches} given", fallback_reason)
    if reduce and fallback_reason:
        raise UserError(
            f"reduce: the model {fallback_reason}, so no branch can read the others; leave reduce out"
        )
    starts = start_times(tokens.lengths, tokens.tree, config.align_to)[1:].tolist()
    prompts = tokens.lengths[1:].tolist()
    new_tokens = [params.max_new_tokens for params in request.params]
    ends = [sum(lengths) for lengths in zip(starts, prompts, new_tokens, strict=True)]
    total = len(tokens.ids) + sum(new_tokens)
    last = ends.index(max(ends))  # of all branches, the one that needs the most positions
    others = total - prompts[last] - new_tokens[last]
    _check_context(model, config, starts[last], others, prompts[last], new_tokens[last])
    if reduce:
        if not reduce.token_ids:
            raise UserError("reduce: holds no token; give it text, or leave it out")
        check_token_ids(model, reduce.token_ids, [reduce.params])
        num_new = reduce.params.max_new_tokens
        _check_context(model, config, max(ends), total, len(reduce.token_ids), num_new)


def check_added_branch(
    model: Model,
    config: RopeConfig,
    group: SequenceGroup,
    token_ids: list[int],
    params: SamplingParams,
    fallback_reason: str | None,
) -> None:
    """Raise UserError as `check_request` does, for a branch that is added to an unfinished sample."""
    if not token_ids:
        raise UserError("branches: the new branch holds no token; give it text")
    if group.reduce_started:
        raise UserError("branches: the reduce branch has started; submit another sample")
    _check_patched(model, "one more given", fallback_reason)
    check_token_ids(model, token_ids, [params])
    start = group.next_start_time(len(token_ids))
    others = len(group.main) + sum(branch.max_tokens for branch in group.branches)
    _check_context(model, config, start, others, len(token_ids), params.max_new_tokens)


def check_token_ids(model: Model, token_ids: Sequence[int], params: Sequence[SamplingParams]) -> None:
    """Raise UserError for a token id outside the model's vocabulary."""
    embeddings: Any = model.get_input_embeddings()
    size = len(embeddings.weight)
    biased = [token for branch_params in params for token, _ in branch_params.logit_bias]
    for field, ids in (("token id", token_ids), ("logit_bias", biased)):
        unknown = [token for token in ids if not 0 <= token < size]
        if unknown:
            raise UserError(
                f"{field} {unknown[0]}: the model's vocabulary is 0..{size - 1}; "
                "encode with the model's own tokenizer"
            )


def _check_patched(model: Model, given: str, fallback_reason: str | None) -> None:
    if fallback_reason is None and not is_patched(model):
        raise UserError(f"branches: {given}, but the model is not patched; load it with load_model_with_lora")


def _check_context(
    model: Model, config: RopeConfig, start: int, others: int, num_prompt: int, num_new: int
) -> None:
    """Raise UserError for a branch that exceeds the model's positions.

    start: its start time. others: upper bound of all other tokens of its sample. num_prompt, num_new: its
    own tokens.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1  # -1: none
    before = others if config.positions == "flat" else start
    if 0 <= limit < before + num_prompt + num_new:
        raise UserError(
            f"max_new_tokens={num_new}: {num_prompt} prompt tokens and {num_new} new ones, after {before} "
            f"others, exceed the model's {limit} positions; shorten the sample or lower max_new_tokens"
        )
