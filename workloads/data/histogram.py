"""Histograms of positive integers, as buckets and as bars of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_MAX_SINGLE_VALUES = 12  # a range of at most this many integers gets one bucket per integer


@dataclass(frozen=True, slots=True)
class Bucket:
    """Number of values in low..high, both included."""

    low: int
    high: int
    count: int

    @property
    def label(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}–{self.high}"


def histogram(values: Sequence[int]) -> list[Bucket]:
    """Buckets from the lowest to the highest value, without gaps.

    A small range gets one bucket per integer, a larger one two buckets per doubling (…9–12, 13–16, 17–24…).
    """
    low, high = min(values), max(values)
    if high - low < _MAX_SINGLE_VALUES:
        ends = np.arange(low, high + 1)
    else:
        ends = np.unique(np.append(np.outer(2 ** np.arange(high.bit_length()), [2, 3]), 1))
    bucket_of = np.searchsorted(ends, values)
    counts = np.bincount(bucket_of)
    starts = np.append(ends[0], ends[:-1] + 1)
    return [
        Bucket(int(starts[index]), int(ends[index]), int(counts[index]))
        for index in range(bucket_of.min(), bucket_of.max() + 1)
    ]


def bars(buckets: Sequence[Bucket], width: int) -> list[str]:
    """One line per bucket. The longest bar has `width` cells; a bucket that is not empty has at least one."""
    label_width = max(len(bucket.label) for bucket in buckets)
    max_count = max(bucket.count for bucket in buckets)
    lengths = [max(round(width * bucket.count / max_count), int(bucket.count > 0)) for bucket in buckets]
    return [
        f"{bucket.label:>{label_width}}  {'█' * length:<{width}}  {bucket.count:,}"
        for bucket, length in zip(buckets, lengths, strict=True)
    ]
