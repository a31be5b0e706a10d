"""Tokenised records to samples to batches: seeded, in one pass, nothing lost.

The batches of an epoch are one sequence, which depends on the data, the settings and (seed, epoch) alone.
Workers take turns, so how many there are changes who trains on a batch, never which batches there are; and
the number of batches taken so far says, whoever has taken them, exactly what is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from parallelmind.config import DataConfig, RopeConfig
from parallelmind.layout import Batch, Ints, Tokens, arrange, collate

_SHUFFLE, _GROUP, _DELAY, _BATCH = range(
    4
)  # streams of their own: a change of one setting leaves the others' draws alone


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

    def generator(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, *stream])


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """The samples of one batch. delays: `[branches]` extra time before the branches of each sample."""

    samples: list[Tokens]
    delays: list[Ints]

    def batch(self, rope: RopeConfig, pad_id: int) -> Batch:
        return make_batch(self.samples, rope, pad_id, self.delays)


def groups(rows: Iterable[Row], data: DataConfig, seeds: Seeds) -> Iterator[SampleBatch]:
    """Shuffle, group and batch the rows of an epoch."""
    rows = shuffle(rows, data.shuffle_window, seeds.generator(_SHUFFLE))
    samples = pack(rows, data, seeds.generator(_GROUP))
    for number, chosen in enumerate(batch(samples, data, seeds.generator(_BATCH))):
        delays = seeds.generator(_DELAY, number)
        late = [
            delays.integers(0, data.random_time_offset, size=sample.branches, endpoint=True)
            for sample in chosen
        ]
        yield SampleBatch(chosen, late)


def shuffle(rows: Iterable[Row], window: int, generator: np.random.Generator) -> Iterator[Row]:
    """Rows in random order, `window` of them held at a time. Shuffling before grouping gives new neighbours
    every epoch.
    """
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


def pack(rows: Iterable[Row], config: DataConfig, generator: np.random.Generator) -> Iterator[Tokens]:
    """Samples. Lone rows gather into groups of `branches_per_sample`, or of a size drawn from min..max; a
    group also ends where the next row would exceed `max_sample_tokens`. The last group may be small.
    """
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
    return int(
        generator.integers(config.min_branches_per_sample, config.max_branches_per_sample, endpoint=True)
    )


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


def batch(
    samples: Iterable[Tokens], config: DataConfig, generator: np.random.Generator
) -> Iterator[list[Tokens]]:
    """Samples of like length in batches of `batch_size` samples (or branches), or of at most `batch_tokens`
    places.

    `length_window` batches' worth of samples are held, sorted by length, cut, and their batches given out in
    random order.
    """
    held: list[Tokens] = []
    places = 0
    for sample in samples:
        held.append(sample)
        places += len(sample.ids)
        if config.batch_tokens is None:
            full = len(held) >= config.length_window * config.batch_size
        else:
            full = places >= config.length_window * config.batch_tokens
        if full:
            yield from _cut_by_length(held, config, generator)
            held, places = [], 0
    yield from _cut_by_length(held, config, generator)


def _cut_by_length(
    held: list[Tokens], config: DataConfig, generator: np.random.Generator
) -> Iterator[list[Tokens]]:
    if config.length_window > 1:
        held = sorted(held, key=lambda sample: -len(sample.ids))
    batches: list[list[Tokens]] = []
    for sample in held:
        if not batches or not _fits(batches[-1], sample, config):
            batches.append([])
        batches[-1].append(sample)
    order = generator.permutation(len(batches)) if config.length_window > 1 else range(len(batches))
    yield from (batches[index] for index in order)


def _fits(batch: list[Tokens], sample: Tokens, config: DataConfig) -> bool:
    if config.batch_tokens is not None:
        longest = max(len(sample.ids), *(len(other.ids) for other in batch))
        return (len(batch) + 1) * longest <= config.batch_tokens
    if config.batch_by_samples:
        return len(batch) < config.batch_size
    return sum(other.branches for other in batch) + sample.branches <= config.batch_size


def make_batch(
    samples: Sequence[Tokens], rope: RopeConfig, pad_id: int, delays: Sequence[Ints] | None = None
) -> Batch:
    """Padded layouts of the samples. delays: one `[branches]` array per sample, extra time before each
    branch.
    """
    late: Sequence[Ints | None] = [None] * len(samples) if delays is None else delays
    return collate(
        [arrange(sample, rope, delay) for sample, delay in zip(samples, late, strict=True)], pad_id
    )


def regrouped(rows: Iterable[Row], branches: int, pool: int, config: DataConfig) -> list[Tokens]:
    """The first `pool` branches as samples of `branches` each: the same text whatever `branches` is.

    Branches of one record stay with their main, so its last sample may hold fewer.
    """
    fixed = config.model_copy(update={"branches_per_sample": branches, "max_branches_per_sample": branches})
    return list(pack(_first_branches(rows, pool), fixed, np.random.default_rng(0)))


def _first_branches(rows: Iterable[Row], pool: int) -> Iterator[Row]:
    for row in rows:
        if pool <= 0:
            return
        yield row if row.tokens.branches <= pool else Row(_cut(row.tokens, 0, pool), row.lone)
        pool -= row.tokens.branches
