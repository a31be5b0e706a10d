"""What is refused before any computing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from parallelmind.config import RopeConfig
from parallelmind.engine.model_runner import Model
from parallelmind.engine.request import TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.sequence_group import Running
from parallelmind.errors import UserError
from parallelmind.layout import start_times
from parallelmind.model.patch import is_patched


def check_ids(model: Model, ids: Sequence[int], params: Sequence[SamplingParams]) -> None:
    """Raises UserError for a token that the model does not know."""
    embeddings: Any = model.get_input_embeddings()
    size = len(embeddings.weight)
    for what, known in (
        ("token id", ids),
        ("logit_bias", [token for each in params for token, _ in each.logit_bias]),
    ):
        wrong = [token for token in known if not 0 <= token < size]
        if wrong:
            raise UserError(
                f"{what} {wrong[0]}: the model knows 0..{size - 1}; encode with the model's own tokenizer"
            )


def check_sample(
    model: Model, config: RopeConfig, asked: TokenizedRequest, fallback_reason: str | None
) -> None:
    """Raises UserError for tokens the model does not know, for branches it cannot hold, and for more than its
    context holds.

    fallback_reason: why the model's branches cannot share a sequence, if so.
    """
    tokens, last = asked.tokens, asked.reduce
    check_ids(model, tokens.ids.tolist(), asked.params)
    if tokens.branches > 1 or last:
        _refuse_untaught(model, f"{tokens.branches} given", fallback_reason)
    if last and fallback_reason:
        raise UserError(
            f"reduce: the model {fallback_reason}, so that no branch can read others; leave reduce out"
        )
    most = np.array([each.max_new_tokens for each in asked.params])
    starts, prompts = start_times(tokens.lengths, config.align_to)[1:], tokens.lengths[1:]
    everything, worst = len(tokens.ids) + int(most.sum()), int((starts + prompts + most).argmax())
    others = everything - int(prompts[worst] + most[worst])
    _check_context(model, config, int(starts[worst]), others, int(prompts[worst]), int(most[worst]))
    if last:
        if not last.token_ids:
            raise UserError("reduce: holds no token; give it text, or leave it out")
        check_ids(model, last.token_ids, [last.params])
        end = int((starts + prompts + most).max())
        _check_context(model, config, end, everything, len(last.token_ids), last.params.max_new_tokens)


def check_joining(
    model: Model,
    config: RopeConfig,
    entry: Running,
    ids: list[int],
    params: SamplingParams,
    fallback_reason: str | None,
) -> None:
    """Raises UserError as `check_sample`, for one branch more of a sample that is going on."""
    if not ids:
        raise UserError("branches: the new one holds no token; give it text")
    if entry.decoding.reads_all.any():
        raise UserError("branches: the one that reads all others has begun; begin another sample")
    _refuse_untaught(model, "one more given", fallback_reason)
    check_ids(model, ids, [params])
    others = len(entry.decoding.main) + sum(map(entry.tokens_of, range(len(entry.most))))
    _check_context(model, config, entry.decoding.start_of(len(ids)), others, len(ids), params.max_new_tokens)


def _refuse_untaught(model: Model, given: str, fallback_reason: str | None) -> None:
    if fallback_reason is None and not is_patched(model):
        raise UserError(f"branches: {given}, but the model is not patched; load it with load_model_with_lora")


def _check_context(model: Model, config: RopeConfig, start: int, others: int, prompt: int, new: int) -> None:
    """Refuse a branch that would run past the positions that the model was made for.

    start: its first time. others: all tokens that its sample can ever hold beside it. prompt, new: its own
    tokens.
    """
    limit = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None) or -1
    )  # -1: as long as one likes
    before = others if config.positions == "flat" else start
    if 0 <= limit < before + prompt + new:
        raise UserError(
            f"max_new_tokens={new}: {prompt} prompt tokens and {new} new ones, after {before} others, exceed "
            f"the model's {limit} positions; shorten the sample or lower max_new_tokens"
        )
