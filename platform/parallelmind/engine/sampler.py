"""Sample the next token of every branch from the logits, in one pass over rows with different settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from parallelmind.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from parallelmind.model.hf_compat import process_rows
from parallelmind.tree import Ints

_NO_TOKEN = -1  # in a tensor of token ids
_SMALLEST, _LARGEST = 1e-15, 1e15  # settings within these bounds keep scores finite in float32


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """A branch whose next token is sampled.

    seed, branch, index: the random draw is a function of these alone, so that any engine can continue a
        branch. `branch` is the index of the branch in its sample, `index` the number of its decoded tokens.
    history: token ids of main and of the branch, prompt first; used by the repetition penalty alone.
    """

    params: SamplingParams
    seed: int
    branch: int
    index: int
    history: Sequence[int] | Ints


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The next token of a branch.

    token: None if the logits are not finite, which no token can be sampled from.
    logprob: natural log-probability of `token`, if `SamplingParams.logprobs` is set.
    top: (id, log-probability) pairs of the most likely tokens, in descending order.
    Both are of the model's own distribution, before any setting changes it.
    """

    token: int | None
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def random_seed() -> int:
    """A seed from torch's global generator, which `torch.manual_seed` controls."""
    return int(torch.randint(2**62, ()))


@torch.inference_mode()
def sample_tokens(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Sample the next token of every row.

    logits: `[rows, vocab]`; not modified. The token of a row does not depend on the other rows. A row whose
        largest logit is NaN or infinite gets no token.
    """
    scores = _apply_repetition_penalty(_apply_logit_bias(logits, rows), rows)
    largest, token_ids = scores.max(dim=-1)  # NaN if any score of the row is
    random = [index for index, row in enumerate(rows) if row.params.temperature]
    if random:
        token_ids[random] = _draw(scores[random].float(), [rows[index] for index in random])
    is_finite = largest.isfinite()
    if all(row.params.logprobs is None for row in rows):
        return [_sampled(token) for token in token_ids.where(is_finite, _NO_TOKEN).tolist()]
    return _with_logprobs(logits, token_ids, is_finite, rows)


def _sampled(token: int, *logprobs: Any) -> SampledToken:
    return SampledToken(None, None) if token == _NO_TOKEN else SampledToken(token, *(logprobs or (None,)))


def _apply_logit_bias(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    biases = [(index, token, bias) for index, row in enumerate(rows) for token, bias in row.params.logit_bias]
    if not biases:
        return scores
    indices, tokens, values = (
        torch.tensor(column, device=scores.device) for column in zip(*biases, strict=True)
    )
    return scores.float().index_put((indices, tokens), values.float(), accumulate=True)


def _apply_repetition_penalty(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    penalties = _rows_with([row.params for row in rows], "repetition_penalty", off=1)
    if not penalties:
        return scores
    longest = max(len(rows[index].history) for index in penalties)
    # Padded with an id beyond the vocabulary, which the processor ignores.
    history = np.full((len(penalties), longest), scores.shape[-1])
    for line, index in zip(history, penalties, strict=True):
        line[: len(rows[index].history)] = rows[index].history
    input_ids = torch.from_numpy(history).to(scores.device)
    return _process(hf.RepetitionPenaltyLogitsProcessor, "penalty", penalties, scores.float(), input_ids)


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """`[rows]` ids by inversion of the cumulative distribution: one random number for each row."""
    cumulative = _shape_distribution(scores, [row.params for row in rows]).softmax(-1).double().cumsum(-1)
    uniform = torch.tensor([[_uniform(row)] for row in rows], dtype=torch.float64, device=scores.device)
    token_ids = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return token_ids.squeeze(-1).clamp_(max=scores.shape[-1] - 1)  # NaN scores give any valid id


def _uniform(row: SamplingRow) -> float:
    """A number in [0, 1) from 53 bits of a hash of (seed, branch, index)."""
    digest = blake2b(f"{row.seed},{row.branch},{row.index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _shape_distribution(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """`[rows, vocab]` scores after temperature, top-k, top-p and min-p, in the order of transformers."""
    temperatures = _rows_with(params, "temperature", off=1)
    scores = _process(hf.TemperatureLogitsWarper, "temperature", temperatures, scores)
    top_k = _rows_with(params, "top_k", off=0)
    for k in set(top_k.values()):  # torch.topk takes one number for all rows
        indices = [index for index, row_k in top_k.items() if row_k == k]
        scores = _replace_rows(scores, indices, partial(_keep_top_k, int(k)))
    scores = _process(hf.TopPLogitsWarper, "top_p", _rows_with(params, "top_p", off=1), scores)
    return _process(hf.MinPLogitsWarper, "min_p", _rows_with(params, "min_p", off=0), scores)


def _keep_top_k(k: int, scores: Tensor) -> Tensor:
    processor: Any = hf.TopKLogitsWarper(k)
    processed: Tensor = processor(None, scores)
    return processed


def _rows_with(params: Sequence[SamplingParams], field: str, off: float) -> dict[int, float]:
    """Values of a setting by row, without the rows where it is off."""
    values = ((index, getattr(row_params, field)) for index, row_params in enumerate(params))
    return {index: value for index, value in values if value != off}


def _process(
    processor: type[hf.LogitsProcessor],
    attribute: str,
    values: dict[int, float],
    scores: Tensor,
    input_ids: Tensor | None = None,
) -> Tensor:
    """Apply a processor of transformers to these rows, with a different value for each of them."""
    column = torch.tensor(list(values.values()), dtype=torch.float32, device=scores.device)
    column = column.clamp(_SMALLEST, _LARGEST)
    return _replace_rows(
        scores, list(values), lambda rows: process_rows(processor, attribute, column, rows, input_ids)
    )


def _replace_rows(scores: Tensor, indices: list[int], process: Callable[[Tensor], Tensor]) -> Tensor:
    """`scores` with these rows processed."""
    if not indices:
        return scores
    if len(indices) == len(scores):
        return process(scores)
    index = torch.tensor(indices, device=scores.device)
    return scores.index_copy(0, index, process(scores[index]))


def _with_logprobs(
    logits: Tensor, token_ids: Tensor, is_finite: Tensor, rows: Sequence[SamplingRow]
) -> list[SampledToken]:
    logprobs = logits.float().log_softmax(dim=-1)
    # Always the same number, because the order of equal values depends on it.
    count = min(MAX_LOGPROBS, logprobs.shape[-1])
    top_logprobs, top_ids = logprobs.topk(count)
    chosen = token_ids[:, None]
    # One copy to the host; float64 represents every id exactly.
    shown = chosen.where(is_finite[:, None], _NO_TOKEN)
    table = torch.cat([shown.double(), logprobs.gather(1, chosen), top_ids, top_logprobs], dim=1)
    sampled = []
    for row, (token, logprob, *top) in zip(rows, table.tolist(), strict=True):
        if row.params.logprobs is None:
            sampled.append(_sampled(int(token)))
            continue
        pairs = zip(map(int, top[:count]), top[count:], strict=True)
        # A token that the model itself excludes has no finite log-probability.
        possible = tuple(pair for pair in pairs if pair[1] > -math.inf)
        sampled.append(_sampled(int(token), logprob, possible[: row.params.logprobs]))
    return sampled
