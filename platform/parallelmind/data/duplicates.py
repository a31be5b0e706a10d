"""Count records that occur more than once, or in two data sets, by hashes of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from parallelmind.data.records import Record

ALL_BYTES = 1 << 30  # of data below this size, every record is compared; of larger data, a share
_SPACE = 1 << 64  # number of possible hashes


def hash_share(data_bytes: int) -> float:
    """Share of all possible hashes to keep for data of this size; it bounds the memory of the hashes."""
    return min(1.0, ALL_BYTES / max(data_bytes, 1))


def record_hash(record: Record) -> int:
    """64-bit hash of what is trained on: the same for every form of a record, whatever its metadata."""
    is_flat = record.is_flat
    segments = record.branches if is_flat else record.walk()
    content: tuple[object, ...] = (
        record.main,
        [(item.body, item.completion, item.targets, item.rendered) for item in segments],
    )
    if not is_flat:
        tree = record.tree
        content += (
            tree.parents.tolist(),
            tree.is_reduce.tolist(),
            *([tree.documents] if tree.documents else []),
        )
    return int.from_bytes(hashlib.blake2b(repr(content).encode(), digest_size=8).digest(), "little")


def pack_hashes(hashes: Iterable[int], share: float) -> bytes:
    """The hashes that lie in the lowest `share` of all possible ones, 8 bytes each."""
    limit = int(share * _SPACE)
    return np.array([value for value in hashes if value < limit], np.uint64).tobytes()


@dataclass(frozen=True, slots=True)
class RecordHashes:
    """Hashes of the records of a data set.

    values: `[n]` sorted. share: share of all possible hashes that they were chosen from; counts are exact if
    it is 1, otherwise they are estimates.
    """

    values: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    share: float = 1.0

    @staticmethod
    def unpack(packed: bytes, share: float) -> RecordHashes:
        """From the joined results of `pack_hashes`."""
        return RecordHashes(np.sort(np.frombuffer(packed, np.uint64)), share)

    def repeated(self) -> int:
        """Number of records with the content of an earlier one."""
        return round(int((np.diff(self.values) == 0).sum()) / self.share)

    def shared_with(self, other: RecordHashes) -> int:
        """Number of records whose content is also in the other data set."""
        share = min(self.share, other.share)
        end = np.searchsorted(self.values, np.uint64(min(int(share * _SPACE), _SPACE - 1)))
        return round(int(np.isin(self.values[:end], other.values).sum()) / share)
