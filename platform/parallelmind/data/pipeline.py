"""JSONL files through Ray Data: a survey that finds every malformed line first, then a stream of tokenised records.

Both read byte ranges in parallel; a line belongs to the range in which it begins. Lines end at a newline byte and
nowhere else. Records travel as Arrow lists, so there is no Python object per token. Nothing here imports torch or
transformers before a tokenizer is needed: every reading process would pay seconds for it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.train import DataConfig as RayDataConfig

from parallelmind.config import BaseConfig, DataConfig
from parallelmind.data.files import ByteRange, byte_ranges
from parallelmind.data.grouping import Row
from parallelmind.data.records import RecordError, parse_line
from parallelmind.errors import UserError
from parallelmind.layout import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from parallelmind.data.tokenise import Tokenised

_TASK_CPUS = 0.25  # workers hold 0.5 each, so that on two CPUs two of them still leave room to read
_RANGES_PER_READER = 16

_SURVEY = pa.schema([("lines", pa.int64()), ("records", pa.int64()), ("branches", pa.int64()), ("lone", pa.int64()),
                     ("bad_lines", pa.list_(pa.int64())), ("bad_reasons", pa.list_(pa.string()))])  # fmt: skip
_ROWS = pa.schema([("ids", pa.list_(pa.int32())), ("lengths", pa.list_(pa.int32())), ("answer_offsets", pa.list_(pa.int32())),
                   ("lone", pa.bool_()), ("truncated", pa.int32()), ("skipped", pa.int32())])  # fmt: skip


@dataclass(frozen=True, slots=True)
class BadLine:
    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(slots=True)
class Survey:
    """What the files hold. `lone` counts the records that grouping will gather."""

    lines: int = 0
    records: int = 0
    branches: int = 0
    lone: int = 0
    bad: list[BadLine] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)  # records of every byte range

    def largest_share(self, workers: int) -> float:
        """Share of the records that the busiest worker gets (see `OrderedSplit`); the number of steps depends on it."""
        rows = [0] * workers
        for records in self.blocks:
            rows[rows.index(min(rows))] += records
        return max(rows) / max(self.records, 1)

    def samples(self, config: DataConfig) -> float:
        """About how many samples an epoch holds, before anything is skipped or split for its length."""
        mean = config.branches_per_sample or (config.min_branches_per_sample + config.max_branches_per_sample) / 2
        return self.lone / mean + max(self.records - self.lone, (self.branches - self.lone) / config.max_branches_per_sample)


def survey(files: Sequence[str], workers: int, strict: bool, vocab_size: int | None = None, name: str = "data_path") -> Survey:
    """Parse every line once. Raises UserError without a single good record and, if strict, at the first bad one."""
    ranges = byte_ranges(files, workers)
    found = Survey()
    before = lines = 0
    if ranges:
        dataset = _dataset(ranges, functools.partial(_survey_range, vocab_size=vocab_size))
        dataset.context.execution_options.preserve_order = True
        for place, row in zip(ranges, dataset.take_all(), strict=True):
            before = 0 if place.start == 0 else before + lines  # lines of this file in earlier ranges
            lines = row["lines"]
            _add(found, row, place.file, before)
    if found.bad and strict:
        raise UserError(f"{name}: {found.bad[0]}; mend the line, or set strict=false to leave out bad lines ({len(found.bad)})")
    if not found.records:
        example = f"; the first: {found.bad[0]}" if found.bad else ""
        raise UserError(f"{name}={files[0]}: no record in it ({len(found.bad)} bad lines{example}); write one JSON object a line")
    return found


def _dataset(ranges: Sequence[ByteRange], function: Any) -> ray.data.Dataset:
    """One block per range, mapped to one Arrow table each; as many reading processes as there is work for."""
    readers = ray.data.TaskPoolStrategy(size=max(1, len(ranges) // _RANGES_PER_READER))
    items = [{"file": place.file, "start": place.start, "end": place.end} for place in ranges]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    return dataset.map_batches(function, batch_size=1, batch_format="pyarrow", num_cpus=_TASK_CPUS, compute=readers)


def _range_of(table: pa.Table) -> ByteRange:
    return ByteRange(**table.to_pylist()[0])


def _survey_range(table: pa.Table, vocab_size: int | None) -> pa.Table:
    counts: Counter[str] = Counter()
    bad_lines, bad_reasons = [], []
    for number, raw in enumerate(_range_of(table).lines(), start=1):
        counts["lines"] = number
        if not raw.strip():
            continue
        try:
            record = parse_line(raw, vocab_size)
        except RecordError as error:
            bad_lines.append(number)
            bad_reasons.append(str(error))
        else:
            counts.update(records=1, branches=len(record.branches), lone=int(record.lone))
    row = {name: counts[name] for name in ("lines", "records", "branches", "lone")}
    return pa.Table.from_pylist([{**row, "bad_lines": bad_lines, "bad_reasons": bad_reasons}], schema=_SURVEY)


def _add(found: Survey, row: dict[str, Any], file: str, before: int) -> None:
    for name in ("lines", "records", "branches", "lone"):
        setattr(found, name, getattr(found, name) + row[name])
    found.blocks.append(row["records"])
    found.bad += [BadLine(file, before + number, why) for number, why in zip(row["bad_lines"], row["bad_reasons"], strict=True)]


def sample_rows(files: Sequence[str], workers: int, data: DataConfig, base: BaseConfig) -> ray.data.Dataset:
    """One row per good record: token ids, lengths, answer offsets, and what the length limits cost."""
    return _dataset(byte_ranges(files, workers), functools.partial(_tokenise_range, data=data, base=base))


def _tokenise_range(table: pa.Table, data: DataConfig, base: BaseConfig) -> pa.Table:
    return to_table(read_range(_range_of(table), _tokenizer(base), data))


@functools.cache
def _tokenizer(base: BaseConfig) -> PreTrainedTokenizerBase:
    """Loaded once per process, not once per range."""
    from parallelmind.model.base import load_tokenizer

    return load_tokenizer(base)


def read_range(place: ByteRange, tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> Iterator[tuple[Tokenised, bool]]:
    """Every good record of a range, tokenised, and whether it is a lone one. Bad lines were reported by the survey."""
    from parallelmind.data.tokenise import tokenise

    vocab_size = len(tokenizer)
    for raw in place.lines():
        if not raw.strip():
            continue
        try:
            record = parse_line(raw, vocab_size)
        except RecordError:
            continue
        yield tokenise(record, tokenizer, data), record.lone


def to_table(records: Iterable[tuple[Tokenised, bool]]) -> pa.Table:
    """Tokenised records as Arrow lists; a record without a branch left has empty ones."""
    none = Tokens(*(np.empty(0, np.int64) for _ in range(3)))
    columns: dict[str, list[Any]] = {name: [] for name in _ROWS.names}
    for item, lone in records:
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


class OrderedSplit(RayDataConfig):
    """Hands the ordered blocks to whichever worker has the fewest rows: the same split every time, no dropped tail.

    Workers may get unequal numbers of rows; the training loop expects that.
    """

    def configure(self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        shards: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset = dataset.copy(dataset)
            dataset.context.execution_options.preserve_order = True
            for shard, part in zip(shards, dataset.streaming_split(world_size, equal=False), strict=True):
                shard[name] = part
        return shards
