"""Tokenised records to samples to batches: seeded, in one pass, without loss.

The batches of an epoch form one sequence, which depends only on the data, the settings and (seed, epoch).
Workers take its batches in turns. The number of workers decides which worker trains on a batch, never which
batches exist. The number of batches taken so far determines exactly which ones remain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from parallelmind.config import DataConfig, RopeConfig
from parallelmind.layout import Batch, Tokens, arrange, collate
from parallelmind.tree import MAIN, Ints, Tree, divide

# Separate random streams, so that changing one setting leaves the draws of the others unchanged.
_SHUFFLE, _GROUP, _DELAY, _BATCH = range(4)


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """A tokenised record with at least one branch. Standalone records are grouped into samples."""

    tokens: Tokens
    standalone: bool


@dataclass(frozen=True, slots=True)
class EpochSeed:
    """Seed of all random choices in one epoch."""

    seed: int
    epoch: int = 0

    def generator(self, *stream: int) -> np.random.Generator:
        """The generator of one random stream."""
        return np.random.default_rng([self.seed, self.epoch, *stream])


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """The samples of one batch. delays: one `[branches]` array per sample, extra time before each branch."""

    samples: list[Tokens]
    delays: list[Ints]

    def collate(self, rope: RopeConfig, pad_id: int, packing: bool = False) -> Batch:
        """The batch for the model, as `make_batch` makes it."""
        return make_batch(self.samples, rope, pad_id, self.delays, packing)


def sample_batches(
    records: Iterable[TokenRecord], data: DataConfig, seed: EpochSeed
) -> Iterator[SampleBatch]:
    """Shuffle, pack and batch the records of an epoch."""
    shuffled = shuffle(records, data.shuffle_window, seed.generator(_SHUFFLE))
    samples = pack(shuffled, data, seed.generator(_GROUP))
    for number, samples_of_batch in enumerate(batch(samples, data, seed.generator(_BATCH))):
        generator = seed.generator(_DELAY, number)
        delays = [
            generator.integers(0, data.random_time_offset, size=sample.branches, endpoint=True)
            for sample in samples_of_batch
        ]
        yield SampleBatch(samples_of_batch, delays)


def shuffle(
    records: Iterable[TokenRecord], window: int, generator: np.random.Generator
) -> Iterator[TokenRecord]:
    """Records in random order, with `window` of them in memory.

    Records are shuffled before they are packed, so that samples combine different records in every epoch.
    """
    buffer: list[TokenRecord] = []
    for record in records:
        buffer.append(record)
        if len(buffer) >= window:
            yield _pop_random(buffer, generator)
    while buffer:
        yield _pop_random(buffer, generator)


def _pop_random(buffer: list[TokenRecord], generator: np.random.Generator) -> TokenRecord:
    index = int(generator.integers(len(buffer)))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()


def pack(
    records: Iterable[TokenRecord], data: DataConfig, generator: np.random.Generator
) -> Iterator[Tokens]:
    """Pack records into samples.

    Standalone records form groups of `branches_per_sample`, or of a size drawn from
    `min_branches_per_sample..max_branches_per_sample`. A group also ends where the next record would exceed
    `max_sample_tokens`; the last group may be smaller. Other records are split if they are too large.
    """
    group: list[Tokens] = []
    size = _group_size(data, generator)
    for record in records:
        tokens = record.tokens
        if not record.standalone:
            yield from split(tokens, data.max_branches_per_sample, data.max_sample_tokens)
            continue
        if group and sum(len(member.ids) for member in group) + len(tokens.ids) > data.max_sample_tokens:
            yield merge(group)
            group, size = [], _group_size(data, generator)
        group.append(tokens)
        if len(group) == size:
            yield merge(group)
            group, size = [], _group_size(data, generator)
    if group:
        yield merge(group)


def _group_size(data: DataConfig, generator: np.random.Generator) -> int:
    if data.branches_per_sample is not None:
        return data.branches_per_sample
    return int(generator.integers(data.min_branches_per_sample, data.max_branches_per_sample, endpoint=True))


def merge(samples: Sequence[Tokens]) -> Tokens:
    """One sample with the branches of several samples, none of which has a main."""
    assert all(sample.lengths[MAIN] == 0 and sample.tree.is_flat for sample in samples)
    lengths = np.concatenate([[0], *(sample.lengths[1:] for sample in samples)])
    return Tokens(
        np.concatenate([sample.ids for sample in samples]),
        lengths,
        np.concatenate([sample.targets for sample in samples]),
        Tree.flat(len(lengths) - 1),
    )


def split(tokens: Tokens, max_branches: int, max_tokens: int) -> Iterator[Tokens]:
    """Samples of at most `max_branches` limited branches and `max_tokens` tokens.

    Each repeats main and the segments that its own ones continue; a target is one in its first sample only.
    What a reduce reads stays together, so a sample may have more branches. `tokenise` has already skipped a
    segment that exceeds `max_tokens` together with all that it reads.
    """
    if tokens.tree.limited_branches <= max_branches and len(tokens.ids) <= max_tokens:
        yield tokens
        return
    remaining = replace(tokens, targets=tokens.targets.copy())
    for kept in divide(tokens.lengths.tolist(), tokens.tree, max_branches, max_tokens):
        yield remaining.take(kept)
        remaining.targets[tokens.places(kept)] = False


def batch(
    samples: Iterable[Tokens], data: DataConfig, generator: np.random.Generator
) -> Iterator[list[Tokens]]:
    """Batches of samples of similar length.

    A batch holds `batch_size` samples (or branches), or at most `batch_tokens` tokens, padding included.
    `length_window` batches' worth of samples are held in memory, sorted by length and cut into batches, which
    are yielded in random order. With packing nothing is padded, so nothing is sorted.
    """
    window: list[Tokens] = []
    tokens = 0
    for sample in samples:
        window.append(sample)
        tokens += len(sample.ids)
        if data.batch_tokens is None:
            full = len(window) >= data.length_window * data.batch_size
        else:
            full = tokens >= data.length_window * data.batch_tokens
        if full:
            yield from _batch_window(window, data, generator)
            window, tokens = [], 0
    yield from _batch_window(window, data, generator)


def _batch_window(
    window: list[Tokens], data: DataConfig, generator: np.random.Generator
) -> Iterator[list[Tokens]]:
    sorts = data.length_window > 1 and not data.packing
    if sorts:
        window = sorted(window, key=lambda sample: -len(sample.ids))
    batches: list[list[Tokens]] = []
    for sample in window:
        if not batches or not _fits(batches[-1], sample, data):
            batches.append([])
        batches[-1].append(sample)
    order = generator.permutation(len(batches)) if sorts else range(len(batches))
    yield from (batches[index] for index in order)


def _fits(samples: list[Tokens], sample: Tokens, data: DataConfig) -> bool:
    """Whether one more sample fits into a batch."""
    if data.batch_tokens is not None and data.packing:
        return sum(len(member.ids) for member in samples) + len(sample.ids) <= data.batch_tokens
    if data.batch_tokens is not None:
        longest = max(len(member.ids) for member in (*samples, sample))
        return (len(samples) + 1) * longest <= data.batch_tokens
    if data.batch_by_samples:
        return len(samples) < data.batch_size
    return sum(member.branches for member in samples) + sample.branches <= data.batch_size


def make_batch(
    samples: Sequence[Tokens],
    rope: RopeConfig,
    pad_id: int,
    delays: Sequence[Ints] | None = None,
    packing: bool = False,
) -> Batch:
    """The batch of the samples: padded rows, or with packing a single row.

    delays: one `[branches]` array per sample, extra time before each branch; None for no extra time.
    """
    delay_of: Sequence[Ints | None] = [None] * len(samples) if delays is None else delays
    layouts = [arrange(sample, rope, delay) for sample, delay in zip(samples, delay_of, strict=True)]
    return collate(layouts, pad_id, packing)
