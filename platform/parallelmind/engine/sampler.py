"""Draw the next token of every branch from the logits: one pass over rows with different settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from parallelmind.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from parallelmind.layout import Ints


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One live branch that is about to get a token.

    seed: `params.seed`, or one from `random_seed` for the branch's sample. branch: its index in the sample.
    index: how many tokens it has been given before; (seed, branch, index) fix a draw, so a branch can go on
    anywhere. history: `[tokens]` ids that it has read or said, prompt first; looked at for a repetition
    penalty only.
    """

    params: SamplingParams
    seed: int
    branch: int
    index: int
    history: Sequence[int] | Ints


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A branch's next token.

    logprob, top: where asked for, the natural log-probability of `token`, and the likeliest (id, log-probability) pairs from
        the likeliest down, by the model's own distribution: before bias, penalty, temperature and the rest.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def random_seed() -> int:
    """A seed from torch's global generator, so that `torch.manual_seed` governs what is sampled without a
    seed.
    """
    return int(torch.randint(2**62, ()))


@torch.inference_mode()
def sample_tokens(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """The next token of every row.

    logits: `[rows, vocab]`, never changed. What a row gets does not depend on the rows beside it.
    """
    scores = _penalised(_biased(logits, rows), rows)
    picked = scores.argmax(dim=-1)
    drawing = [at for at, row in enumerate(rows) if row.params.temperature]
    if drawing:
        picked[drawing] = _draw(scores[drawing].float(), [rows[at] for at in drawing])
    if all(row.params.logprobs is None for row in rows):
        return [SampledToken(token, None) for token in picked.tolist()]
    return _with_logprobs(logits, picked, rows)


def _biased(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    biases = [(at, token, bias) for at, row in enumerate(rows) for token, bias in row.params.logit_bias]
    if not biases:
        return scores
    at, tokens, added = (torch.tensor(column, device=scores.device) for column in zip(*biases, strict=True))
    return scores.float().index_put((at, tokens), added.float(), accumulate=True)


def _penalised(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    penalties = {
        at: row.params.repetition_penalty for at, row in enumerate(rows) if row.params.repetition_penalty != 1
    }
    if not penalties:
        return scores
    longest = max(len(rows[at].history) for at in penalties)
    history = np.full(
        (len(penalties), longest), scores.shape[-1]
    )  # filled up with an id that the processor drops
    for line, at in zip(history, penalties, strict=True):
        line[: len(rows[at].history)] = rows[at].history
    ids = torch.from_numpy(history).to(scores.device)
    return _per_row(hf.RepetitionPenaltyLogitsProcessor, "penalty", penalties, scores.float(), ids)


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """`[rows]` ids, by inverting the cumulative distribution: one number per row instead of one per word of
    the vocabulary.
    """
    cumulative = _warped(scores, [row.params for row in rows]).softmax(dim=-1).double().cumsum(dim=-1)
    uniform = torch.tensor([[_uniform(row)] for row in rows], dtype=torch.float64, device=scores.device)
    picked = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return picked.squeeze(-1).clamp_(max=scores.shape[-1] - 1)  # NaN logits: whatever, but an id


def _uniform(row: SamplingRow) -> float:
    """A number in [0, 1) that is a function of (seed, branch, index) alone: 53 bits of their hash."""
    digest = blake2b(f"{row.seed},{row.branch},{row.index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _warped(scores: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """`[rows, vocab]` scores after what shapes a draw, in transformers' own order."""

    def asked(field: str, off: float) -> dict[int, float]:
        return {at: getattr(own, field) for at, own in enumerate(params) if getattr(own, field) != off}

    scores = _per_row(hf.TemperatureLogitsWarper, "temperature", asked("temperature", off=1), scores)
    top_k = asked("top_k", off=0)
    for k in set(top_k.values()):  # topk takes one number for all
        scores = _apply(hf.TopKLogitsWarper(int(k)), [at for at in top_k if top_k[at] == k], scores)
    scores = _per_row(hf.TopPLogitsWarper, "top_p", asked("top_p", off=1), scores)
    return _per_row(hf.MinPLogitsWarper, "min_p", asked("min_p", off=0), scores)


def _per_row(
    kind: Any, attribute: str, values: dict[int, float], scores: Tensor, history: Any = None
) -> Tensor:
    """Process the rows of `values` (row -> value): processors check for one number, but a `[rows, 1]` column
    computes alike.
    """
    processor = kind(1.0)
    column = torch.tensor(list(values.values()), dtype=torch.float32, device=scores.device)
    setattr(processor, attribute, column.clamp(1e-15, 1e15)[:, None])  # scores stay finite in float32
    return _apply(processor, list(values), scores, history)


def _apply(processor: hf.LogitsProcessor, at: list[int], scores: Tensor, history: Any = None) -> Tensor:
    """`scores` with the rows `at` processed and all others as they are."""
    if not at:
        return scores
    if len(at) == len(scores):
        return processor(history, scores)
    where = torch.tensor(at, device=scores.device)
    return scores.index_copy(0, where, processor(history, scores[where]))


def _with_logprobs(logits: Tensor, picked: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    logs = logits.float().log_softmax(dim=-1)
    width = min(
        MAX_LOGPROBS, logs.shape[-1]
    )  # always as many, since which of several equals comes first depends on it
    values, ids = logs.topk(width)
    own = picked[:, None]
    table = torch.cat(
        [own.double(), logs.gather(1, own), ids, values], dim=1
    )  # float64 holds every id: one copy to the host
    choices = []
    for row, (token, logprob, *likeliest) in zip(rows, table.tolist(), strict=True):
        top = zip(map(int, likeliest[:width]), likeliest[width:], strict=True)
        k = row.params.logprobs
        choices.append(
            SampledToken(int(token), None) if k is None else SampledToken(int(token), logprob, tuple(top)[:k])
        )
    return choices
