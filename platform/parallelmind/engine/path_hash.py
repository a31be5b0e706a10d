"""Hashes of paths: equal for two tokens exactly if their keys and values are equal. No torch.

Where branches are isolated and rotate by time, the keys and values of a token depend on the tokens of its
path, on their time coordinates, on their branch coordinates if these rotate anything or have embeddings, and
on the adapter. A hash is made of just these, token by token, so that it does not depend on how a path is
divided into segments and blocks: a turn that was decoded by a branch is found by the next turn, whose main
holds it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

_DIGEST_BYTES = 16
_JUMP, _COORDINATE = 1 << 61, 1 << 62  # added to an entry of the hashed sequence that is not a token id


class PathHash:
    """The hash of a path, which is extended by tokens.

    length: tokens of the segment that are hashed. num_blocks: blocks that hold them.
    """

    __slots__ = ("_first", "_hash", "_starts_at", "length", "num_blocks")

    def __init__(self, first: Any, starts_at: tuple[int, int]) -> None:
        """first: hash of all before the segment. starts_at: its branch and time coordinates, as hashed."""
        self._first, self._hash, self._starts_at = first, first.copy(), starts_at
        self.length = self.num_blocks = 0

    @staticmethod
    def root(adapter_version: str) -> PathHash:
        """The hash of a path that begins with main."""
        return PathHash(blake2b(adapter_version.encode(), digest_size=_DIGEST_BYTES), (0, 0))

    def start(self) -> PathHash:
        """The hash at the start of its segment."""
        return PathHash(self._first, self._starts_at)

    def copy(self) -> PathHash:
        """A hash that is extended apart from this one."""
        other = PathHash.__new__(PathHash)
        other._first, other._starts_at, other._hash = self._first, self._starts_at, self._hash.copy()
        other.length, other.num_blocks = self.length, self.num_blocks
        return other

    def child(self, token_ids: Sequence[int], coordinate: int, time: int) -> PathHash:
        """The hash at the start of a segment that continues a whole segment with these tokens.

        coordinate: its branch coordinate, 0 where keys do not depend on it. time: its start time.
        """
        whole, (own_coordinate, start_time) = self.start(), self._starts_at
        whole.extend(token_ids)
        if time != start_time + len(token_ids):
            whole._hash.update(_entry(_JUMP, time))
        if coordinate != own_coordinate:
            whole._hash.update(_entry(_COORDINATE, coordinate))
        return PathHash(whole._hash, (coordinate, time))

    def extend(self, token_ids: Sequence[int]) -> bytes:
        """Append the tokens of a block; returns the hash up to their end."""
        self._hash.update(array("q", token_ids).tobytes())
        self.length, self.num_blocks = self.length + len(token_ids), self.num_blocks + 1
        return self.digest()

    def digest(self) -> bytes:
        """The hash of all that was appended."""
        digest: bytes = self._hash.digest()
        return digest


def _entry(kind: int, value: int) -> bytes:
    return array("q", [kind + value]).tobytes()
