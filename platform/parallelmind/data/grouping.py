"""Tokenised records to samples to batches: seeded, in one pass, nothing lost.

Every random choice comes from (seed, epoch, rank), so the same worker sees the same batches again after a restart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from parallelmind.config import DataConfig, RopeConfig
from parallelmind.layout import Batch, Ints, Tokens, arrange, collate

_SHUFFLE, _GROUP, _DELAY = range(3)  # streams of their own: a change of one setting leaves the others' draws alone


@dataclass(frozen=True, slots=True)
class Row:
    """A tokenised record; `lone` ones are grouped into samples."""

    tokens: Tokens
    lone: bool


@dataclass(frozen=True, slots=True)
class Seeds:
    """What every random choice depends on."""

    seed: int
    epoch: int = 0
    rank: int = 0

    def generator(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, self.rank, stream])


def batches(rows: Iterable[Row], data: DataConfig, rope: RopeConfig, pad_id: int, seeds: Seeds) -> Iterator[Batch]:
    """Shuffle, group, batch and lay out the rows of one worker's epoch."""
    rows = shuffled(rows, data.shuffle_window, seeds.generator(_SHUFFLE))
    samples = grouped(rows, data, seeds.generator(_GROUP))
    delays = seeds.generator(_DELAY)
    for group in batched(samples, data.batch_size, data.batch_by_samples):
        drawn = [delays.integers(0, data.random_time_offset, size=sample.branches, endpoint=True) for sample in group]
        yield make_batch(group, rope, pad_id, drawn)


def shuffled(rows: Iterable[Row], window: int, generator: np.random.Generator) -> Iterator[Row]:
    """Rows in random order, `window` of them held at a time. Shuffling before grouping gives new neighbours every epoch."""
    held: list[Row] = []
    for row in rows:
        held.append(row)
        if len(held) >= window:
            yield _take(held, generator)
    while held:
        yield _take(held, generator)


def _take(held: list[Row], generator: np.random.Generator) -> Row:
    index = int(generator.integers(len(held)))
    held[index], held[-1] = held[-1], held[index]
    return held.pop()


def grouped(rows: Iterable[Row], config: DataConfig, generator: np.random.Generator) -> Iterator[Tokens]:
    """Samples. Lone rows gather into groups of `branches_per_sample`, or of a size drawn from min..max; a group also
    ends where the next row would exceed `max_sample_tokens`. The last group may be small."""
    held: list[Tokens] = []
    size = _group_size(config, generator)
    for row in rows:
        if not row.lone:
            yield from split(row.tokens, config.max_branches_per_sample, config.max_sample_tokens)
            continue
        if held and sum(len(tokens.ids) for tokens in held) + len(row.tokens.ids) > config.max_sample_tokens:
            yield merge(held)
            held, size = [], _group_size(config, generator)
        held.append(row.tokens)
        if len(held) == size:
            yield merge(held)
            held, size = [], _group_size(config, generator)
    if held:
        yield merge(held)


def _group_size(config: DataConfig, generator: np.random.Generator) -> int:
    if config.branches_per_sample is not None:
        return config.branches_per_sample
    return int(generator.integers(config.min_branches_per_sample, config.max_branches_per_sample, endpoint=True))


def merge(parts: Sequence[Tokens]) -> Tokens:
    """One sample of all branches of samples that have no main."""
    assert all(part.lengths[0] == 0 for part in parts)
    return Tokens(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([[0], *(part.lengths[1:] for part in parts)]),
        np.concatenate([part.answer_offsets for part in parts]),
    )


def split(tokens: Tokens, max_branches: int, max_tokens: int) -> Iterator[Tokens]:
    """Samples of at most `max_branches` branches and `max_tokens` tokens, main repeated in each.

    A single branch that is too long beside its main was left out before (see `tokenise`).
    """
    first, total = 0, tokens.lengths[0]
    for index, length in enumerate(tokens.lengths[1:]):
        if index > first and (index - first == max_branches or total + length > max_tokens):
            yield _cut(tokens, first, index)
            first, total = index, tokens.lengths[0]
        total += length
    yield _cut(tokens, first, tokens.branches)


def _cut(tokens: Tokens, first: int, last: int) -> Tokens:
    """The sample of branches first..last-1."""
    main = tokens.lengths[0]
    ends = np.cumsum(tokens.lengths)
    return Tokens(
        np.concatenate([tokens.ids[:main], tokens.ids[ends[first] : ends[last]]]),
        np.concatenate([[main], tokens.lengths[first + 1 : last + 1]]),
        tokens.answer_offsets[first:last],
    )


def batched(samples: Iterable[Tokens], size: int, by_samples: bool) -> Iterator[list[Tokens]]:
    """Lists of `size` samples, or of at most `size` branches (one sample at least). The last may be small."""
    held: list[Tokens] = []
    count = 0
    for sample in samples:
        weight = 1 if by_samples else sample.branches
        if held and count + weight > size:
            yield held
            held, count = [], 0
        held.append(sample)
        count += weight
    if held:
        yield held


def make_batch(samples: Sequence[Tokens], rope: RopeConfig, pad_id: int, delays: Sequence[Ints] | None = None) -> Batch:
    """Padded layouts of the samples. delays: one `[branches]` array per sample, extra time before each branch."""
    late: Sequence[Ints | None] = [None] * len(samples) if delays is None else delays
    return collate([arrange(sample, rope, delay) for sample, delay in zip(samples, late, strict=True)], pad_id)


def regrouped(rows: Iterable[Row], branches: int, pool: int, config: DataConfig) -> list[Tokens]:
    """The first `pool` branches as samples of `branches` each: the same text whatever `branches` is.

    Branches of one record stay with their main, so its last sample may hold fewer.
    """
    fixed = config.model_copy(update={"branches_per_sample": branches, "max_branches_per_sample": branches})
    return list(grouped(_first_branches(rows, pool), fixed, np.random.default_rng(0)))


def _first_branches(rows: Iterable[Row], pool: int) -> Iterator[Row]:
    for row in rows:
        if pool <= 0:
            return
        yield row if row.tokens.branches <= pool else Row(_cut(row.tokens, 0, pool), row.lone)
        pool -= row.tokens.branches
