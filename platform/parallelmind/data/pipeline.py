"""Files through Ray Data: a survey of every line first, then one stream of batches that all workers share.

Parts of files are read and tokenised in parallel, in order, by Ray Data; a feeder takes the records, shuffles, groups and
batches them, and gives the batches out in turns. Records travel as Arrow lists, so there is no Python object per token.
Nothing here imports torch or transformers before a tokenizer is needed: every reading process would pay seconds for it.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Full, Queue
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from parallelmind.config import BaseConfig, DataConfig
from parallelmind.data.files import Part, file_parts
from parallelmind.data.grouping import Group, Row, Seeds, groups
from parallelmind.data.survey import Survey, combine, records, survey_part
from parallelmind.layout import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from parallelmind.data.tokenise import Tokenised

_TASK_CPUS = 0.25  # workers hold 0.5 each, so that on two CPUs two of them still leave room to read
_PARTS_PER_READER = 16
_AHEAD = 4  # batches that wait for each worker
_KEPT = 64 << 20  # bytes of tokenised records that the feeder keeps for later epochs
_IN_FLIGHT = 256 << 20  # bytes of records between reading and batching; Ray Data would fill its whole store with them

_ROWS = pa.schema([("ids", pa.list_(pa.int32())), ("lengths", pa.list_(pa.int32())), ("answer_offsets", pa.list_(pa.int32())),
                   ("lone", pa.bool_()), ("truncated", pa.int32()), ("skipped", pa.int32())])  # fmt: skip


def quiet_data() -> None:
    """No progress bars from Ray Data in this process, and no warnings about them."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def survey(files: Sequence[str], config: DataConfig, vocab_size: int | None = None, name: str = "data_path") -> Survey:
    """Parse every line once. Raises UserError for no good record and for more bad ones than the settings allow."""
    parts = file_parts(files)
    rows = _dataset(parts, functools.partial(_survey_table, config=config, vocab_size=vocab_size)).take_all() if parts else []
    found = combine(parts, rows)
    found.refuse_too_many(config, name)
    return found


def _dataset(parts: Sequence[Part], function: Any) -> ray.data.Dataset:
    """One block per part, mapped in order to one Arrow table each; as many reading processes as there is work for.

    Each holds a tokenizer and the libraries under it, so there is never more than one for each CPU.
    """
    cpus = int(ray.cluster_resources().get("CPU", 1))
    readers = ray.data.TaskPoolStrategy(size=max(1, min(len(parts) // _PARTS_PER_READER, cpus)))
    items = [{"file": part.file, "start": part.start, "end": part.end} for part in parts]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    mapped = dataset.map_batches(function, batch_size=1, batch_format="pyarrow", num_cpus=_TASK_CPUS, compute=readers)
    options = mapped.context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(object_store_memory=_IN_FLIGHT)
    return mapped


def _part_of(table: pa.Table) -> Part:
    return Part(**table.to_pylist()[0])


def _survey_table(table: pa.Table, config: DataConfig, vocab_size: int | None) -> pa.Table:
    return pa.Table.from_pylist([survey_part(_part_of(table), config, vocab_size)])


def sample_rows(files: Sequence[str], data: DataConfig, base: BaseConfig) -> ray.data.Dataset:
    """One row per good record, in the order of the files: token ids, lengths, answer offsets, what the length limits cost."""
    return _dataset(file_parts(files), functools.partial(_tokenise_part, data=data, base=base))


def _tokenise_part(table: pa.Table, data: DataConfig, base: BaseConfig) -> pa.Table:
    return to_table(read_part(_part_of(table), _tokenizer(base), data))


@functools.cache
def _tokenizer(base: BaseConfig) -> PreTrainedTokenizerBase:
    """Loaded once per process, not once per part."""
    from parallelmind.model.base import load_tokenizer

    return load_tokenizer(base)


def read_part(part: Part, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Iterator[tuple[Tokenised, bool]]:
    """Every good record of a part, tokenised, and whether it is a lone one. Bad lines were reported by the survey."""
    from parallelmind.data.tokenise import tokenised

    for record, item in tokenised(records(part, data, len(tokenizer)), tokenizer, data):
        yield item, record.lone


def to_table(tokenised: Iterable[tuple[Tokenised, bool]]) -> pa.Table:
    """Tokenised records as Arrow lists; a record without a branch left has empty ones."""
    none = Tokens(*(np.empty(0, np.int64) for _ in range(3)))
    columns: dict[str, list[Any]] = {name: [] for name in _ROWS.names}
    for item, lone in tokenised:
        tokens = item.tokens or none
        for name in ("ids", "lengths", "answer_offsets"):
            columns[name].append(getattr(tokens, name).astype(np.int32))
        for name, value in (("lone", lone), ("truncated", item.truncated), ("skipped", item.skipped)):
            columns[name].append(value)
    return pa.table(columns, schema=_ROWS)


def to_rows(tables: Iterable[pa.Table], counts: Counter[str]) -> Iterator[Row]:
    """The records of Arrow tables; adds what was truncated and skipped to `counts`."""
    for table in tables:
        if not table.num_rows:
            continue
        lists = [_arrays(table.column(name)) for name in ("ids", "lengths", "answer_offsets")]
        for *parts, lone in zip(*lists, table.column("lone").to_pylist(), strict=True):
            if len(parts[0]):
                yield Row(Tokens(*parts), lone)
        for name in ("truncated", "skipped"):
            counts[name] += int(np.sum(table.column(name).to_numpy()))


def _arrays(column: pa.ChunkedArray) -> list[Any]:
    """One integer array per row of a list column."""
    combined = column.combine_chunks()
    offsets = combined.offsets.to_numpy()
    return np.split(combined.values.to_numpy().astype(np.int64)[offsets[0] : offsets[-1]], (offsets - offsets[0])[1:-1])


class Feeder:
    """The batches of an epoch, given out in turns: batch k goes to worker (k - first) mod workers. Run it as an actor.

    Where a restart finds `first` batches already taken, by however many workers, it goes on with exactly the others.
    """

    def __init__(self, read: Callable[[], Iterable[pa.Table]], data: DataConfig, seed: int) -> None:
        self._read, self._config, self._seed = read, data, seed
        self._kept: list[pa.Table] | None = None  # of an earlier epoch, where all of it is small
        self._lock = threading.Lock()
        self._run: _Run | None = None

    def next(self, epoch: int, first: int, workers: int, rank: int) -> Group | Counter[str]:
        """The worker's next batch; after its last, what the length limits cost. Raises what the reading raised."""
        with self._lock:
            if self._run is None or self._run.key != (epoch, first, workers):
                if self._run:
                    self._run.stop.set()
                self._run = _Run((epoch, first, workers), self._groups)
            queue = self._run.queues[rank]
        found = queue.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _groups(self, epoch: int, counts: Counter[str]) -> Iterator[Group]:
        tables = self._keeping() if self._kept is None else self._kept
        return groups(to_rows(tables, counts), self._config, Seeds(self._seed, epoch))

    def _keeping(self) -> Iterator[pa.Table]:
        """The tables as they are read; if they are few, later epochs need not read and tokenise them again."""
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

    def __init__(self, key: tuple[int, int, int], groups_of: Any) -> None:
        self.key, self._groups_of = key, groups_of
        self.stop = threading.Event()
        self.queues: list[Queue[Any]] = [Queue(_AHEAD) for _ in range(key[2])]
        threading.Thread(target=self._fill, daemon=True).start()

    def _fill(self) -> None:
        epoch, first, workers = self.key
        counts: Counter[str] = Counter()
        last: Counter[str] | BaseException = counts
        try:
            for number, group in enumerate(self._groups_of(epoch, counts)):
                if number >= first and not self._put((number - first) % workers, group):
                    return
        except BaseException as error:  # for whoever asks next
            last = error
        for rank in range(workers):
            self._put(rank, last)

    def _put(self, rank: int, item: Any) -> bool:
        """Wait until the worker has room; false once the run is over."""
        while not self.stop.is_set():
            try:
                self.queues[rank].put(item, timeout=0.2)
                return True
            except Full:
                continue
        return False


def feed(feeder: Any, epoch: int, first: int, workers: int, rank: int, counts: Counter[str]) -> Iterator[Group]:
    """This worker's batches of an epoch from the `Feeder` actor; the next one is on its way while one is trained on."""
    waiting = feeder.next.remote(epoch, first, workers, rank)
    while isinstance(found := ray.get(waiting), Group):
        waiting = feeder.next.remote(epoch, first, workers, rank)
        yield found
    counts.update(found)


def start_feeder(files: Sequence[str], data: DataConfig, base: BaseConfig, seed: int, workers: int) -> Any:
    """A `Feeder` actor; every worker may wait in it at once."""
    options = {"num_cpus": _TASK_CPUS, "max_concurrency": 2 * workers + 2}
    read = functools.partial(_tables, list(files), data, base)
    return ray.remote(Feeder).options(**options).remote(read, data, seed)


def _tables(files: Sequence[str], data: DataConfig, base: BaseConfig) -> Iterable[pa.Table]:
    quiet_data()
    tables: Iterable[pa.Table] = sample_rows(files, data, base).iter_batches(batch_size=None, batch_format="pyarrow")
    return tables
