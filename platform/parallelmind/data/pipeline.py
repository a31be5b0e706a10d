"""The data pipeline on Ray Data: a survey of every line, then one stream of batches for all workers.

Ray Data reads and tokenises file parts in parallel and in order. A batch server shuffles, packs and batches
the records, and serves the batches to the workers in turns. Records travel as Arrow lists, without a Python
object per token. torch and transformers are imported only when a tokenizer is needed, because importing them
costs every reader process seconds.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.util.placement_group import NODE_ID_LABEL_KEY
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from parallelmind.config import DataConfig, ModelConfig
from parallelmind.data.batch_server import BatchServer, ShardAssignment
from parallelmind.data.duplicates import hash_share
from parallelmind.data.files import FilePart, file_parts, total_bytes
from parallelmind.data.packing import SampleBatch
from parallelmind.data.survey import SAMPLE_CHARACTERS, Survey, combine_surveys, survey_part
from parallelmind.data.tables import to_table
from parallelmind.data.tokenise import tokenise_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_READER_CPUS = 0.9  # of a reader before training: fits on one CPU beside the driver of a trial
_PARTS_PER_READER = 16
_FEW_PARTS = 4  # up to this number, parts are read in this process; starting reader processes takes longer
_FEW_BYTES = 4 << 20  # of files that are tokenised in this process, where all their tables are in memory
_RECORDS_PER_TABLE = 4096  # a compressed file is one part, whatever its size
# Sampled characters, as a multiple of the sample's size: some draws are unlucky, and some records are longer
# than the whole sample.
_OVERSAMPLING = 4
# Limit of records between reading and batching; Ray Data would fill its whole object store with them.
_IN_FLIGHT_BYTES = 256 << 20


def silence_ray_data() -> None:
    """Turn off the progress bars of Ray Data in this process, and its warnings about them."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def survey_files(
    files: Sequence[str], config: DataConfig, vocab_size: int | None = None, field: str = "data_path"
) -> Survey:
    """Parse every line once. Raises UserError if none is good, or more are bad than the config allows."""
    parts = file_parts(files, field)
    size = total_bytes(files)
    shares = {"share": _OVERSAMPLING * SAMPLE_CHARACTERS / max(size, 1), "hash_share": hash_share(size)}
    if len(parts) <= _FEW_PARTS:
        rows = [survey_part(part, config, vocab_size, **shares) for part in parts]
    else:
        function = functools.partial(_survey_table, config=config, vocab_size=vocab_size, shares=shares)
        rows = map_parts(parts, function, int(ray.cluster_resources().get("CPU", 1))).take_all()
    survey = combine_surveys(parts, rows, shares["hash_share"])
    survey.raise_if_unusable(config, field)
    return survey


def map_parts(
    parts: Sequence[FilePart],
    function: Callable[[pa.Table], pa.Table | Iterator[pa.Table]],
    max_readers: int,
    num_cpus: float = _READER_CPUS,
    node_id: str | None = None,
) -> ray.data.Dataset:
    """Map every file part to Arrow tables, in order. The number of reader processes follows the work.

    function: receives a table of one row with the fields of a `FilePart`. max_readers: a reader process holds
    a tokenizer and the libraries under it, so there should be at most one per CPU. num_cpus: reserved by each
    reader. node_id: of the node that runs the readers; any node by default.
    """
    readers = ray.data.TaskPoolStrategy(size=max(1, min(len(parts) // _PARTS_PER_READER, max_readers)))
    items = [{"file": part.file, "start": part.start, "end": part.end} for part in parts]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    mapped = dataset.map_batches(
        function,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=num_cpus,
        compute=readers,
        label_selector=None if node_id is None else {NODE_ID_LABEL_KEY: node_id},
    )
    # Trials read data, too: the object that is their output does not tell whether it is a terminal.
    mapped.context.enable_progress_bars = False
    options = mapped.context.execution_options
    options.preserve_order = True
    options.resource_limits = options.resource_limits.copy(object_store_memory=_IN_FLIGHT_BYTES)
    return mapped


def _part_of(table: pa.Table) -> FilePart:
    return FilePart(**table.to_pylist()[0])


def _survey_table(
    table: pa.Table, config: DataConfig, vocab_size: int | None, shares: Mapping[str, float]
) -> pa.Table:
    return pa.Table.from_pylist([survey_part(_part_of(table), config, vocab_size, **shares)])


def _tokenise_table(table: pa.Table, config: DataConfig, model: ModelConfig) -> Iterator[pa.Table]:
    return _tokenise_to_tables(_part_of(table), config, model)


def _tokenise_to_tables(part: FilePart, config: DataConfig, model: ModelConfig) -> Iterator[pa.Table]:
    """One row per good record of the part. Raises UserError for an id that the model has no embedding of."""
    from parallelmind.model.vocabulary import check_highest_id

    tokenizer = _load_tokenizer(model)
    records = tokenise_part(part, tokenizer, config)
    while chunk := list(islice(records, _RECORDS_PER_TABLE)):
        table = to_table(chunk)
        highest = pc.max(table.column("ids").combine_chunks().flatten()).as_py()
        check_highest_id(highest or 0, part.file, tokenizer, model)
        yield table


@functools.cache
def _load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model, loaded once per process instead of once per part."""
    from parallelmind.model.base_model import load_tokenizer

    return load_tokenizer(model)


def start_batch_server(
    files: Sequence[str],
    config: DataConfig,
    model: ModelConfig,
    seed: int,
    num_workers: int,
    max_readers: int = 1,
) -> Any:
    """Start a `BatchServer` actor in which all workers may wait at once. Returns its handle.

    The actor and its readers run on the node of the caller and reserve no CPU: they compute with the CPUs
    that the caller has reserved. So they never wait for a CPU that training workers hold while those wait for
    a batch. The actor ends when no handle is left. max_readers: reader processes at a time.
    """
    parts = file_parts(files)
    read: Callable[[], Iterable[pa.Table]] = functools.partial(
        _tokenise_with_ray_data, list(files), config, model, max_readers
    )
    if len(parts) <= _FEW_PARTS and total_bytes(files) <= _FEW_BYTES:
        tables = [table for part in parts for table in _tokenise_to_tables(part, config, model)]
        read = functools.partial(iter, tables)
    here = NodeAffinitySchedulingStrategy(_this_node(), soft=False)
    options = {"num_cpus": 0, "max_concurrency": 2 * num_workers + 2, "scheduling_strategy": here}
    return ray.remote(BatchServer).options(**options).remote(read, config, seed)


def _this_node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def _tokenise_with_ray_data(
    files: Sequence[str], config: DataConfig, model: ModelConfig, max_readers: int
) -> Iterable[pa.Table]:
    """Tables with one row per good record, in the order of the files."""
    silence_ray_data()
    function = functools.partial(_tokenise_table, config=config, model=model)
    mapped = map_parts(file_parts(files), function, max_readers, num_cpus=0, node_id=_this_node())
    tables: Iterable[pa.Table] = mapped.iter_batches(batch_size=None, batch_format="pyarrow")
    return tables


def receive_batches(
    batch_server: Any, assignment: ShardAssignment, rank: int, counts: Counter[str]
) -> Iterator[SampleBatch]:
    """This worker's batches of an epoch from the `BatchServer` actor, with one batch requested ahead.

    Adds the numbers of truncated and skipped texts to `counts` after the last batch.
    """
    pending = batch_server.next_batch.remote(assignment, rank)
    while isinstance(item := ray.get(pending), SampleBatch):
        pending = batch_server.next_batch.remote(assignment, rank)
        yield item
    counts.update(item)
