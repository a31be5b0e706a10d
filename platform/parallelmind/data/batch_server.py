"""The batches of an epoch, given out in turns to however many workers there are, and again after a
restart.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Any

import pyarrow as pa

from parallelmind.config import DataConfig
from parallelmind.data.packing import SampleBatch, Seeds, groups
from parallelmind.data.tables import to_rows

_AHEAD = 4  # batches that wait for each worker
_KEPT = 64 << 20  # bytes of tokenised records that the feeder keeps for later epochs
_OVER = "these turns are over: other workers have begun"


@dataclass(frozen=True, slots=True)
class ShardAssignment:
    """Who shares an epoch's batches from the batch `first` on. group: names this start of the workers, apart
    from any other.
    """

    group: str
    epoch: int
    first: int
    workers: int


class BatchServer:
    """The batches of an epoch, given out in turns: batch k goes to worker (k - first) mod workers. Run it as
    an actor.

    Where a restart finds `first` batches already taken, by however many workers, it goes on with exactly the
    others.
    """

    def __init__(self, read: Callable[[], Iterable[pa.Table]], data: DataConfig, seed: int) -> None:
        self._read, self._config, self._seed = read, data, seed
        self._kept: list[pa.Table] | None = None  # of an earlier epoch, where all of it is small
        self._lock = threading.Lock()
        self._run: _Run | None = None
        self._over: set[str] = set()  # groups of workers that others have taken the place of

    def next(self, turns: ShardAssignment, rank: int) -> SampleBatch | Counter[str]:
        """The worker's next batch; after its last, what the length limits cost. Raises what the reading
        raised.
        """
        with self._lock:
            run = self._run_of(turns)
        found = run.get(rank)
        if isinstance(found, BaseException):
            raise found
        return found

    def _run_of(self, turns: ShardAssignment) -> _Run:
        if turns.group in self._over:  # a late call of a worker that was given up for lost
            raise RuntimeError(_OVER)
        if self._run is None or self._run.turns != turns:
            if self._run:
                self._run.stop.set()
                self._over |= {self._run.turns.group} - {turns.group}
            self._run = _Run(turns, self._groups)
        return self._run

    def _groups(self, epoch: int, counts: Counter[str]) -> Iterator[SampleBatch]:
        tables = self._keeping() if self._kept is None else self._kept
        return groups(to_rows(tables, counts), self._config, Seeds(self._seed, epoch))

    def _keeping(self) -> Iterator[pa.Table]:
        """The tables as they are read; if they are few, later epochs need not read and tokenise them
        again.
        """
        kept: list[pa.Table] = []
        size = 0
        for table in self._read():
            size += table.nbytes
            kept = [*kept, table] if size <= _KEPT else []
            yield table
        if size <= _KEPT:
            self._kept = kept


class _Run:
    """One epoch on its way: a thread that fills a short queue for each worker."""

    def __init__(self, turns: ShardAssignment, groups_of: Any) -> None:
        self.turns, self._groups_of = turns, groups_of
        self.stop = threading.Event()
        self._queues: list[Queue[Any]] = [Queue(_AHEAD) for _ in range(turns.workers)]
        threading.Thread(target=self._fill, daemon=True).start()

    def get(self, rank: int) -> Any:
        """Wait for the worker's next item. Raises RuntimeError once the run is over: nobody waits for the
        answer then.
        """
        while not self.stop.is_set():
            try:
                return self._queues[rank].get(timeout=0.2)
            except Empty:
                continue
        raise RuntimeError(_OVER)

    def _fill(self) -> None:
        turns = self.turns
        counts: Counter[str] = Counter()
        last: Counter[str] | BaseException = counts
        try:
            for number, group in enumerate(self._groups_of(turns.epoch, counts)):
                if number >= turns.first and not self._put((number - turns.first) % turns.workers, group):
                    return
        except BaseException as error:  # for whoever asks next
            last = error
        for rank in range(turns.workers):
            self._put(rank, last)

    def _put(self, rank: int, item: Any) -> bool:
        """Wait until the worker has room; false once the run is over."""
        while not self.stop.is_set():
            try:
                self._queues[rank].put(item, timeout=0.2)
                return True
            except Full:
                continue
        return False
