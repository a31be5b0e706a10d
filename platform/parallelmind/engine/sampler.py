"""Sample the next token of every branch from the logits, in one pass over rows with different settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from parallelmind.engine import native_largest
from parallelmind.engine.grammar_matcher import TokenMasks
from parallelmind.engine.output import TokenLogprob
from parallelmind.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from parallelmind.model.hf_compat import process_rows
from parallelmind.model.transfer import HostCopy, to_device
from parallelmind.tree import Ints

_NO_TOKEN = native_largest.NOT_FINITE  # in a tensor of token ids
_SMALLEST, _LARGEST = 1e-15, 1e15  # settings within these bounds keep scores finite in float32
_MIN_CHUNK, _MAX_CHUNK = 128, 1024  # logits
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
# `[256, 8]` upper bounds of logits for every byte of a mask, the lowest bit first. A minimum takes a CPU a
# tenth of the time of a fill by booleans.
_BOUNDS = torch.tensor([-math.inf, math.inf])[torch.from_numpy(_BITS).int()]
_MAX_ROWS = 64  # of a prompt, for which log-probabilities are computed at once


class SamplingRow(Protocol):
    """A branch whose next token is sampled.

    seed, branch, index: the random draw is a function of these alone, so that any engine can continue a
        branch. `branch` is the index of the branch in its sample, 0 for an independent one; `index` the
        number of its decoded tokens.
    history: token ids of main and of the branch, prompt first; used by the repetition penalty alone.
    """

    @property
    def params(self) -> SamplingParams: ...
    @property
    def seed(self) -> int: ...
    @property
    def branch(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def history(self) -> Sequence[int] | Ints: ...


class SampledToken(NamedTuple):
    """The next token of a branch.

    token: None if the logits are not finite, which no token can be sampled from.
    logprob: natural log-probability of `token`, if `SamplingParams.logprobs` is set.
    top: (id, log-probability) pairs of the most likely tokens, in descending order.
    Both are of the model's own distribution, before any setting but a grammar changes it. A grammar leaves
    the tokens that it allows.
    """

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class _Column(NamedTuple):
    """A setting on the rows where it is on. rows: `[n]` indices, None for all. values: `[n]` float32."""

    rows: Tensor | None
    values: Tensor


@dataclass(frozen=True, slots=True)
class _SamplingMetadata:
    """The settings of a batch as columns on the device; None for a setting that is off on all rows.

    random: `[n]` indices of the rows that are drawn. The four columns after it count these rows alone.
    max_top_k: the largest top_k, on the host.
    logit_bias: rows, token ids and values of all biases.
    """

    random: Tensor | None
    temperature: _Column | None
    top_k: _Column | None
    max_top_k: int
    top_p: _Column | None
    min_p: _Column | None
    repetition_penalty: _Column | None
    logit_bias: tuple[Tensor, ...] | None
    has_logprobs: bool

    @staticmethod
    def of(params: Sequence[SamplingParams], device: torch.device) -> _SamplingMetadata:
        random = [index for index, row in enumerate(params) if row.temperature]
        drawn = [params[index] for index in random]
        biases = [(index, *pair) for index, row in enumerate(params) for pair in row.logit_bias]
        columns = [to_device(torch.tensor(column), device) for column in zip(*biases, strict=True)]
        return _SamplingMetadata(
            random=to_device(torch.tensor(random), device) if random else None,
            temperature=_column(drawn, "temperature", 1, device),
            top_k=_column(drawn, "top_k", 0, device),
            max_top_k=max((row.top_k for row in drawn), default=0),
            top_p=_column(drawn, "top_p", 1, device),
            min_p=_column(drawn, "min_p", 0, device),
            repetition_penalty=_column(params, "repetition_penalty", 1, device),
            logit_bias=tuple(columns) or None,
            has_logprobs=any(row.logprobs is not None for row in params),
        )


def _column(params: Sequence[SamplingParams], field: str, off: float, device: torch.device) -> _Column | None:
    values = [getattr(row, field) for row in params]
    rows = [index for index, value in enumerate(values) if value != off]
    if not rows:
        return None
    within = [min(values[index], _LARGEST) for index in rows]  # an integer may exceed every float
    column = torch.tensor(within, dtype=torch.float32).clamp(min=_SMALLEST)
    index = None if len(rows) == len(params) else to_device(torch.tensor(rows), device)
    return _Column(index, to_device(column, device))


def random_seed() -> int:
    """A seed from torch's global generator, which `torch.manual_seed` controls."""
    return int(torch.randint(2**62, ()))


class PendingTokens:
    """Tokens that a device samples.

    ids: `[rows]` on the device; negative for a row without a token.
    """

    def __init__(self, ids: Tensor, table: Tensor, counts: Sequence[int | None] | None = None) -> None:
        """table: what the host reads: `ids`, or `_logprobs` of them if there are counts.

        counts: most likely tokens to return with each token.
        """
        self.ids, self._counts = ids, counts
        self._copy = HostCopy(table)

    @staticmethod
    def of(token_ids: Sequence[int]) -> PendingTokens:
        """Tokens that are known."""
        ids = torch.tensor(token_ids, dtype=torch.int64)
        return PendingTokens(ids, ids)

    def read(self) -> list[SampledToken]:
        """The tokens, as soon as they are sampled. Does not wait for what the device computes after that."""
        lines = self._copy.tolist()
        if self._counts is None:
            return [SampledToken(token if token != _NO_TOKEN else None) for token in lines]
        return [
            SampledToken(None if found.token == _NO_TOKEN else found.token, found.logprob, found.top)
            for found in map(_row_logprobs, lines, self._counts)
        ]


class Sampler:
    """Samples tokens. The settings of the rows stay on the device until a batch has other rows."""

    def __init__(self) -> None:
        self._params: list[SamplingParams] = []
        self._metadata: _SamplingMetadata | None = None

    def is_greedy(self, rows: Sequence[SamplingRow], device: torch.device) -> bool:
        """Whether the next token of every row is its most likely one, and nothing else is asked for."""
        settings = self._settings([row.params for row in rows], device)
        changes = settings.random, settings.repetition_penalty, settings.logit_bias
        return not settings.has_logprobs and all(change is None for change in changes)

    @torch.inference_mode()
    def __call__(
        self, logits: Tensor, rows: Sequence[SamplingRow], masks: TokenMasks | None = None
    ) -> PendingTokens:
        """Sample the next token of every row.

        logits: `[rows, vocab]`; not modified. The token of a row does not depend on the other rows. A row
            whose largest logit is NaN or infinite gets no token. Or `[rows]` tokens that the model has found.
        masks: the tokens that the grammars of rows allow; all others have the probability 0 there.
        """
        if logits.dim() == 1:
            return PendingTokens(logits, logits)
        logits = _apply_masks(logits, masks)
        settings = self._settings([row.params for row in rows], logits.device)
        scores = _apply_repetition_penalty(_apply_logit_bias(logits, settings), settings, rows)
        token_ids = _most_likely(scores)
        if (random := settings.random) is not None:
            drawn = _draw(scores[random].float(), settings, rows)
            token_ids[random] = drawn.where(token_ids[random] != _NO_TOKEN, _NO_TOKEN)
        if not settings.has_logprobs:
            return PendingTokens(token_ids, token_ids)
        counts = [row.params.logprobs for row in rows]
        return PendingTokens(token_ids, _logprobs(logits, token_ids), counts)

    def _settings(self, params: list[SamplingParams], device: torch.device) -> _SamplingMetadata:
        if self._metadata is None or params != self._params:
            self._params, self._metadata = params, _SamplingMetadata.of(params, device)
        return self._metadata


def _most_likely(scores: Tensor) -> Tensor:
    """The first index of the largest value of every row; none if it is infinite or if any value is NaN."""
    if not native_largest.is_supported(scores):
        return _first_largest(scores)
    token_ids = native_largest.first_largest(scores)
    rest = token_ids == native_largest.NOT_POSITIVE
    if rest.any():
        token_ids[rest] = _first_largest(scores[rest])
    return token_ids


def _first_largest(scores: Tensor) -> Tensor:
    """`_most_likely` on any device.

    A CPU finds a maximum without its index several times as fast as with it: chunks of a row go first.
    """
    chunks = _chunks(scores)
    largest, first = chunks.amax(dim=-1).max(dim=-1)
    within = _chunk_of_row(chunks, first).max(dim=-1).indices
    return (first * chunks.shape[-1] + within).where(largest.isfinite(), _NO_TOKEN)


def _chunks(scores: Tensor) -> Tensor:
    """`[rows, chunks, values]` view of rows; one chunk if the vocabulary cannot be divided."""
    size = math.gcd(scores.shape[-1], _MAX_CHUNK)
    return scores.unflatten(-1, (-1, size) if size >= _MIN_CHUNK else (1, -1))


def _chunk_of_row(chunks: Tensor, index: Tensor) -> Tensor:
    """`[rows, values]` the chunk of each row that has this index. index: `[rows]`."""
    return chunks[torch.arange(len(chunks), device=chunks.device), index]


def _apply_masks(logits: Tensor, masks: TokenMasks | None) -> Tensor:
    if masks is None:
        return logits
    bits = to_device(masks.bits, logits.device).flatten().int()
    table = to_device(_BOUNDS, logits.device).to(logits.dtype)
    bounds = table.index_select(0, bits).view(len(masks.rows), -1)[:, : logits.shape[-1]]
    if len(masks.rows) == len(logits):
        return logits.minimum(bounds)
    rows = to_device(masks.rows, logits.device)
    return logits.index_copy(0, rows, logits[rows].minimum(bounds))


def _apply_logit_bias(scores: Tensor, settings: _SamplingMetadata) -> Tensor:
    if settings.logit_bias is None:
        return scores
    rows, token_ids, values = settings.logit_bias
    return scores.float().index_put((rows, token_ids), values.float(), accumulate=True)


def _apply_repetition_penalty(
    scores: Tensor, settings: _SamplingMetadata, rows: Sequence[SamplingRow]
) -> Tensor:
    column = settings.repetition_penalty
    if column is None:
        return scores
    penalised = [row for row in rows if row.params.repetition_penalty != 1]
    longest = max(len(row.history) for row in penalised)
    # Padded with an id beyond the vocabulary, which the processor ignores.
    history = np.full((len(penalised), longest), scores.shape[-1])
    for line, row in zip(history, penalised, strict=True):
        line[: len(row.history)] = row.history
    input_ids = to_device(history, scores.device)
    return _process(hf.RepetitionPenaltyLogitsProcessor, "penalty", column, scores.float(), input_ids)


def _draw(scores: Tensor, settings: _SamplingMetadata, rows: Sequence[SamplingRow]) -> Tensor:
    """`[n]` ids by inversion of the cumulative distribution: one random number for each row that is drawn.

    The chunk is found first, then the token in it, so that few sums are cumulated.
    """
    numbers = [[_uniform(row)] for row in rows if row.params.temperature]
    uniform = to_device(torch.tensor(numbers, dtype=torch.float64), scores.device)
    chunks = _chunks(_shape_distribution(scores, settings).softmax(-1))
    sums = chunks.sum(-1, dtype=torch.float64)
    cumulative = sums.cumsum(-1)
    target = uniform * cumulative[:, -1:]
    chunk = _first_above(cumulative, target)
    before = cumulative.gather(1, chunk) - sums.gather(1, chunk)
    within = _chunk_of_row(chunks, chunk.squeeze(-1)).double().cumsum(-1)
    # Rounding must not move the target out of the chunk, to a token that may be excluded.
    last = within[:, -1:] * (1 - torch.finfo(torch.float64).eps)
    token = _first_above(within, (target - before).clamp(min=0).minimum(last))
    return (chunk * chunks.shape[-1] + token).squeeze(-1)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """`[rows, 1]` first index of a larger value; a valid one for NaN, too."""
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)


def _uniform(row: SamplingRow) -> float:
    """A number in [0, 1) from 53 bits of a hash of (seed, branch, index)."""
    digest = blake2b(f"{row.seed},{row.branch},{row.index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _shape_distribution(scores: Tensor, settings: _SamplingMetadata) -> Tensor:
    """`[rows, vocab]` scores after temperature, top-k, top-p and min-p, in the order of transformers."""
    scores = _process(hf.TemperatureLogitsWarper, "temperature", settings.temperature, scores)
    scores = _replace_rows(scores, settings.top_k, partial(_keep_top_k, max_k=settings.max_top_k))
    scores = _replace_rows(scores, settings.top_p, _keep_top_p)
    return _process(hf.MinPLogitsWarper, "min_p", settings.min_p, scores)


def _keep_top_k(scores: Tensor, k: Tensor, max_k: int) -> Tensor:
    """`TopKLogitsWarper` of transformers, which takes one number for all rows, with `[rows]` numbers.

    max_k: the largest of them, on the host: to read it from a device would wait for the device.
    """
    k = k.long().clamp(max=scores.shape[-1])
    largest = scores.topk(min(max_k, scores.shape[-1])).values
    return scores.masked_fill(scores < largest.gather(1, k[:, None] - 1), -math.inf)


def _keep_top_p(scores: Tensor, top_p: Tensor) -> Tensor:
    """`TopPLogitsWarper` of transformers, with `[rows]` numbers.

    Sorts values without their indices, which takes a CPU a twentieth of the time. Of the values that equal
    the smallest one that is kept, the first are excluded, as in a stable sort.
    """
    ascending = _sorted(scores)
    is_excluded = ascending.softmax(-1).cumsum(-1) <= 1 - top_p[:, None]
    num_excluded = is_excluded[:, :-1].sum(-1, keepdim=True)
    smallest = ascending.gather(1, num_excluded)
    is_equal = scores == smallest
    num_equal = num_excluded - torch.searchsorted(ascending, smallest)
    is_excluded = (scores < smallest) | (is_equal & (is_equal.cumsum(-1, dtype=torch.int32) <= num_equal))
    return scores.masked_fill(is_excluded, -math.inf)


def _sorted(scores: Tensor) -> Tensor:
    """Rows in ascending order. NumPy sorts float32 with the vector instructions of the CPU."""
    if scores.device.type == "cpu":
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1))
    return scores.sort(dim=-1).values


def _process(
    processor: type[hf.LogitsProcessor],
    attribute: str,
    column: _Column | None,
    scores: Tensor,
    input_ids: Tensor | None = None,
) -> Tensor:
    """Apply a processor of transformers to the rows of a column, with a different value for each of them."""
    return _replace_rows(
        scores, column, lambda rows, values: process_rows(processor, attribute, values, rows, input_ids)
    )


def _replace_rows(
    scores: Tensor, column: _Column | None, process: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`scores` with the rows of a column processed, given these rows and their values."""
    if column is None:
        return scores
    if column.rows is None:
        return process(scores, column.values)
    return scores.index_copy(0, column.rows, process(scores[column.rows], column.values))


@torch.inference_mode()
def prompt_logprobs(
    logits: Tensor, token_ids: Sequence[int], counts: Sequence[int | None]
) -> list[TokenLogprob]:
    """Log-probabilities of given tokens.

    logits: `[rows, vocab]`. token_ids: the token of each row. counts: most likely tokens to return with it.
    """
    chosen, found = to_device(torch.tensor(token_ids), logits.device), list[TokenLogprob]()
    for first in range(0, len(counts), _MAX_ROWS):
        part = slice(first, first + _MAX_ROWS)
        table = _logprobs(logits[part], chosen[part]).tolist()
        found += map(_row_logprobs, table, counts[part])
    return found


def _logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """`[rows, 2 + 2n]` float64 token and its log-probability, the n most likely tokens, and theirs."""
    logprobs = logits.float().log_softmax(dim=-1)
    # Always the same number, because the order of equal values depends on it.
    num_top = min(MAX_LOGPROBS, logprobs.shape[-1])
    top_logprobs, top_ids = logprobs.topk(num_top)
    chosen = token_ids[:, None]
    # One copy to the host; float64 represents every id exactly.
    of_chosen = logprobs.gather(1, chosen.clamp(min=0))
    return torch.cat([chosen.double(), of_chosen, top_ids, top_logprobs], dim=1)


def _row_logprobs(line: list[Any], count: int | None) -> TokenLogprob:
    """A line of `_logprobs`. None as a count, and no token, give no log-probabilities."""
    token, logprob, *top = line
    if count is None or token == _NO_TOKEN:
        return TokenLogprob(int(token))
    ids, values = top[: len(top) // 2], top[len(top) // 2 :]
    # A token that the model itself excludes has no finite log-probability.
    possible = [pair for pair in zip(map(int, ids), values, strict=True) if pair[1] > -math.inf]
    return TokenLogprob(int(token), logprob, tuple(possible[:count]))
