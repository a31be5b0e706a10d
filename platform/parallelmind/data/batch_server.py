"""Serve the batches of an epoch to any number of workers in turns, and resume after a restart."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, Full, Queue

import pyarrow as pa

from parallelmind.config import DataConfig
from parallelmind.data.packing import EpochSeed, SampleBatch, sample_batches
from parallelmind.data.tables import from_tables

_PREFETCH = 4  # batches that wait for each worker
_CACHE_BYTES = 64 << 20  # limit of tokenised records that are kept in memory for later epochs
_POLL_SECONDS = 0.2
_SUPERSEDED = "this shard assignment has ended: other workers have started"

# The last item of a worker: the counts of the length limits, or the error that ended the stream.
_Item = SampleBatch | Counter[str] | BaseException
_MakeBatches = Callable[[int, Counter[str]], Iterator[SampleBatch]]  # (epoch, counts) -> batches


@dataclass(frozen=True, slots=True)
class ShardAssignment:
    """Which workers share the batches of an epoch, beginning with `first_batch`.

    worker_group: identifies one start of the workers. batches_per_step: of all workers; the steps consist of
    the same batches for any number of workers.
    """

    worker_group: str
    epoch: int
    first_batch: int
    num_workers: int
    batches_per_step: int

    def worker_of(self, batch: int) -> int:
        """The worker that takes a batch of the epoch."""
        return (batch - self.first_batch) % self.batches_per_step % self.num_workers


class BatchServer:
    """Serves every batch of an epoch to the worker that `ShardAssignment` gives it to. Runs as a Ray actor.

    After a restart, any number of workers continue with exactly the batches from `first_batch` on.
    """

    def __init__(self, read: Callable[[], Iterable[pa.Table]], data: DataConfig, seed: int) -> None:
        self._read, self._data, self._seed = read, data, seed
        self._cached_tables: list[pa.Table] | None = None  # all tables of an epoch, if they are small
        self._lock = threading.Lock()
        self._stream: _EpochStream | None = None
        self._ended_groups: set[str] = set()  # worker groups that were replaced by others

    def next_batch(self, assignment: ShardAssignment, rank: int) -> SampleBatch | Counter[str]:
        """The worker's next batch; after its last one, the counts of truncated and skipped texts.

        Raises the exception that reading the data raised.
        """
        with self._lock:
            stream = self._stream_of(assignment)
        item = stream.get(rank)
        if isinstance(item, BaseException):
            raise item
        return item

    def _stream_of(self, assignment: ShardAssignment) -> _EpochStream:
        if assignment.worker_group in self._ended_groups:  # a late call of a worker presumed dead
            raise RuntimeError(_SUPERSEDED)
        if self._stream is None or self._stream.assignment != assignment:
            if self._stream:
                self._stream.stop.set()
                self._ended_groups |= {self._stream.assignment.worker_group} - {assignment.worker_group}
            self._stream = _EpochStream(assignment, self._batches)
        return self._stream

    def _batches(self, epoch: int, counts: Counter[str]) -> Iterator[SampleBatch]:
        tables = self._read_and_cache() if self._cached_tables is None else self._cached_tables
        return sample_batches(from_tables(tables, counts), self._data, EpochSeed(self._seed, epoch))

    def _read_and_cache(self) -> Iterator[pa.Table]:
        """The tables as they are read. Small data is kept, so that later epochs do not tokenise it again."""
        tables: list[pa.Table] = []
        size = 0
        for table in self._read():
            size += table.nbytes
            tables = [*tables, table] if size <= _CACHE_BYTES else []
            yield table
        if size <= _CACHE_BYTES:
            self._cached_tables = tables


class _EpochStream:
    """One epoch in progress: a thread that fills a short queue for each worker."""

    def __init__(self, assignment: ShardAssignment, make_batches: _MakeBatches) -> None:
        self.assignment, self._make_batches = assignment, make_batches
        self.stop = threading.Event()
        self._queues: list[Queue[_Item]] = [Queue(_PREFETCH) for _ in range(assignment.num_workers)]
        threading.Thread(target=self._fill, daemon=True).start()

    def get(self, rank: int) -> _Item:
        """Wait for the worker's next item. Raises RuntimeError after the stream was stopped."""
        while not self.stop.is_set():
            try:
                return self._queues[rank].get(timeout=_POLL_SECONDS)
            except Empty:
                continue
        raise RuntimeError(_SUPERSEDED)

    def _fill(self) -> None:
        assignment = self.assignment
        counts: Counter[str] = Counter()
        last: Counter[str] | BaseException = counts
        try:
            for number, batch in enumerate(self._make_batches(assignment.epoch, counts)):
                if number < assignment.first_batch:
                    continue
                if not self._put(assignment.worker_of(number), batch):
                    return
        except BaseException as error:  # raised in the next call of every worker
            last = error
        for rank in range(assignment.num_workers):
            self._put(rank, last)

    def _put(self, rank: int, item: _Item) -> bool:
        """Wait until the worker's queue has room. Returns False after the stream was stopped."""
        while not self.stop.is_set():
            try:
                self._queues[rank].put(item, timeout=_POLL_SECONDS)
                return True
            except Full:
                continue
        return False
