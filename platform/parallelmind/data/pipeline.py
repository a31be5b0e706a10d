"""Files through Ray Data: a survey of every line first, then one stream of batches that all workers share.

Parts of files are read and tokenised in parallel, in order, by Ray Data; a feeder takes the records,
shuffles, groups and batches them, and gives the batches out in turns. Records travel as Arrow lists, so there
is no Python object per token. Nothing here imports torch or transformers before a tokenizer is needed: every
reading process would pay seconds for it.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from parallelmind.config import DataConfig, ModelConfig
from parallelmind.data.batch_server import BatchServer, ShardAssignment
from parallelmind.data.files import Part, file_parts, total_bytes
from parallelmind.data.packing import SampleBatch
from parallelmind.data.survey import SAMPLE, Survey, combine, records, survey_part
from parallelmind.data.tables import to_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from parallelmind.data.tokenise import Tokenised

_TASK_CPUS = 0.2  # workers leave 0.4 of a CPU at least, which is room for the feeder and a reader
_PARTS_PER_READER = 16
_FEW_PARTS = 4  # are read on the spot: starting processes for them takes longer
_DRAWN = 4  # times what a sample holds: chance, and records as long as a sample, must not leave it empty
_IN_FLIGHT = (
    256 << 20
)  # bytes of records between reading and batching; Ray Data would fill its whole store with them


def quiet_data() -> None:
    """No progress bars from Ray Data in this process, and no warnings about them."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def survey(
    files: Sequence[str], config: DataConfig, vocab_size: int | None = None, name: str = "data_path"
) -> Survey:
    """Parse every line once. Raises UserError for no good record and for more bad ones than the settings
    allow.
    """
    parts = file_parts(files, name)
    share = _DRAWN * SAMPLE / max(total_bytes(files), 1)
    if len(parts) <= _FEW_PARTS:
        rows = [survey_part(part, config, vocab_size, share) for part in parts]
    else:
        look = functools.partial(_survey_table, config=config, vocab_size=vocab_size, share=share)
        rows = _dataset(parts, look).take_all()
    found = combine(parts, rows)
    found.refuse_too_many(config, name)
    return found


def _dataset(parts: Sequence[Part], function: Any) -> ray.data.Dataset:
    """One block per part, mapped in order to one Arrow table each; as many reading processes as there is work
    for.

    Each holds a tokenizer and the libraries under it, so there is never more than one for each CPU.
    """
    cpus = int(ray.cluster_resources().get("CPU", 1))
    readers = ray.data.TaskPoolStrategy(size=max(1, min(len(parts) // _PARTS_PER_READER, cpus)))
    items = [{"file": part.file, "start": part.start, "end": part.end} for part in parts]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    mapped = dataset.map_batches(
        function, batch_size=1, batch_format="pyarrow", num_cpus=_TASK_CPUS, compute=readers
    )
    options = mapped.context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(object_store_memory=_IN_FLIGHT)
    return mapped


def _part_of(table: pa.Table) -> Part:
    return Part(**table.to_pylist()[0])


def _survey_table(table: pa.Table, config: DataConfig, vocab_size: int | None, share: float) -> pa.Table:
    return pa.Table.from_pylist([survey_part(_part_of(table), config, vocab_size, share)])


def epoch_batches(found: Survey, data: DataConfig, base: ModelConfig, seed: int) -> int:
    """About how many batches an epoch holds (see `plan.epoch_batches`)."""
    from parallelmind.data import batch_count as plan

    return plan.epoch_batches(found, _tokenizer(base), data, seed)


def sample_rows(files: Sequence[str], data: DataConfig, base: ModelConfig) -> ray.data.Dataset:
    """One row per good record, in the order of the files: token ids, lengths, answer offsets, what the length
    limits cost.
    """
    return _dataset(file_parts(files), functools.partial(_tokenise_part, data=data, base=base))


def _tokenise_part(table: pa.Table, data: DataConfig, base: ModelConfig) -> pa.Table:
    return to_table(read_part(_part_of(table), _tokenizer(base), data))


@functools.cache
def _tokenizer(base: ModelConfig) -> PreTrainedTokenizerBase:
    """Loaded once per process, not once per part."""
    from parallelmind.model.base_model import load_tokenizer

    return load_tokenizer(base)


def read_part(
    part: Part, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> Iterator[tuple[Tokenised, bool]]:
    """Every good record of a part, tokenised, and whether it is a lone one. Bad lines were reported by the
    survey.
    """
    from parallelmind.data.tokenise import tokenised

    for record, item in tokenised(records(part, data, len(tokenizer)), tokenizer, data):
        yield item, record.lone


def feed(feeder: Any, turns: ShardAssignment, rank: int, counts: Counter[str]) -> Iterator[SampleBatch]:
    """This worker's batches of an epoch from the `BatchServer` actor; the next one is on its way while one is
    trained on.
    """
    waiting = feeder.next.remote(turns, rank)
    while isinstance(found := ray.get(waiting), SampleBatch):
        waiting = feeder.next.remote(turns, rank)
        yield found
    counts.update(found)


def start_feeder(files: Sequence[str], data: DataConfig, base: ModelConfig, seed: int, workers: int) -> Any:
    """A `BatchServer` actor; every worker may wait in it at once."""
    parts = file_parts(files)
    read: Callable[[], Iterable[pa.Table]] = functools.partial(_tables, list(files), data, base)
    if len(parts) <= _FEW_PARTS:
        read = functools.partial(iter, [to_table(read_part(part, _tokenizer(base), data)) for part in parts])
    # None: not in the place that a sweep holds for whoever calls this, which is too small.
    strategy = PlacementGroupSchedulingStrategy(None)  # type: ignore[arg-type]  # documented, not typed
    options = {"num_cpus": _TASK_CPUS, "max_concurrency": 2 * workers + 2, "scheduling_strategy": strategy}
    return ray.remote(BatchServer).options(**options).remote(read, data, seed)


def _tables(files: Sequence[str], data: DataConfig, base: ModelConfig) -> Iterable[pa.Table]:
    quiet_data()
    tables: Iterable[pa.Table] = sample_rows(files, data, base).iter_batches(
        batch_size=None, batch_format="pyarrow"
    )
    return tables
