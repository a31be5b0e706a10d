"""Measured cost of one batch in each part of the platform, for `experiments/005_scale.py`.

`XQUAD=… python -m benchmarks.scale [PART …]` measures all parts or the named ones. Work of one process is
measured in CPU time; waiting for other processes (gloo, a report to Ray Train) in wall-clock time. The best
of all runs on a machine is kept, because other work on the machine can only slow a part down.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from benchmarks.data import start_ray, write_records
from benchmarks.harness import RESULTS, seconds
from benchmarks.processor import machine
from benchmarks.scale_step import cpu_seconds, line, reducing, stepping
from benchmarks.text import texts, tokenizer
from parallelmind.config import DataConfig, RopeConfig
from parallelmind.data.batch_server import BatchServer, ShardAssignment
from parallelmind.data.files import FilePart, file_parts
from parallelmind.data.packing import EpochSeed, SampleBatch, sample_batches
from parallelmind.data.pipeline import map_parts, receive_batches
from parallelmind.data.survey import survey_part
from parallelmind.data.tables import from_tables, to_table
from parallelmind.data.tokenise import tokenise_part

_TOKENS = 16384  # of a worker's batch, padding included
_BYTES = 4 << 20
_MAX_READERS = 2
_SPEEDS = ("gloo_bytes_per_s", "cpu_flops")
_COSTS = RESULTS.parent / "005_scale.costs.json"


@cache
def tables(data: DataConfig) -> list[pa.Table]:
    """Tokenise all records of the data file."""
    return [to_table(tokenise_part(part, tokenizer(), data)) for part in file_parts([data.data_path])]


def batches(data: DataConfig) -> list[SampleBatch]:
    """Group all records into batches."""
    return list(sample_batches(from_tables(tables(data), Counter()), data, EpochSeed(0)))


def reading(data: DataConfig) -> dict[str, float]:
    """Measure survey and tokenisation, and the bytes per token, on the part that one task reads."""
    part = file_parts([data.data_path])[0]
    table = to_table(tokenise_part(part, tokenizer(), data))
    tokens, size = table.column("ids").combine_chunks().values.__len__(), part.end - part.start
    return {
        "bytes_per_token": size / tokens,
        "arrow_bytes_per_token": table.nbytes / tokens,
        "survey_s_per_byte": cpu_seconds(lambda: survey_part(part, data, None)) / size,
        "tokenise_s_per_token": cpu_seconds(lambda: to_table(tokenise_part(part, tokenizer(), data)))
        / tokens,
    }


def batching(data: DataConfig) -> dict[str, Any]:
    """Measure layout in the worker, the distribution of batch sizes, and the visible tokens per token."""
    all_batches = batches(data)
    first_batches = all_batches[:8]
    sizes = [_padded_tokens(batch) for batch in all_batches]
    lengths = np.array([len(sample.ids) for batch in all_batches for sample in batch.samples], float)
    return {
        "layout_s_per_token": cpu_seconds(lambda: [batch.collate(RopeConfig(), 0) for batch in first_batches])
        / sum(map(_tokens, first_batches)),
        "padding_share": float(1 - lengths.sum() / sum(sizes)),
        "seen_per_token": float((lengths**2).sum() / 2 / lengths.sum()),
        "places": [round(float(at) / _TOKENS, 3) for at in np.quantile(sizes, np.linspace(0, 1, 21))],
        "places_at_batch_size_4": _spread(data.model_copy(update={"batch_tokens": None})),
    }


def _tokens(batch: SampleBatch) -> int:
    return sum(len(sample.ids) for sample in batch.samples)


def _padded_tokens(batch: SampleBatch) -> int:
    return max(len(sample.ids) for sample in batch.samples) * len(batch.samples)


def _spread(data: DataConfig) -> float:
    """Standard deviation over mean of the padded tokens of batches."""
    sizes = [_padded_tokens(batch) for batch in batches(data)]
    return float(np.std(sizes) / np.mean(sizes))


@cache
def _ray() -> None:
    start_ray(cpus=2)


class _TimedBatchServer(BatchServer):
    def cpu_seconds(self) -> float:
        return time.process_time()


def feeding(data: DataConfig) -> dict[str, float]:
    """Measure the CPU time of the batch server (shuffle, group, send) with a line through two batch sizes."""
    _ray()
    points = []
    for size in (_TOKENS // 8, _TOKENS):
        config = data.model_copy(update={"batch_tokens": size})
        tokenised = [*tables(data)]
        batch_server: Any = (
            ray.remote(_TimedBatchServer)
            .options(num_cpus=0.2, max_concurrency=4)
            .remote(lambda tokenised=tokenised: iter(tokenised), config, 0)
        )
        list(receive_batches(batch_server, ShardAssignment("", 0, 0, 1, 1), 0, Counter()))
        per_batch, tokens = [], 0.0
        for epoch in (1, 2):
            start = ray.get(batch_server.cpu_seconds.remote())
            sizes = [
                _tokens(batch)
                for batch in receive_batches(batch_server, ShardAssignment("", epoch, 0, 1, 1), 0, Counter())
            ]
            per_batch.append((ray.get(batch_server.cpu_seconds.remote()) - start) / len(sizes))
            tokens = sum(sizes) / len(sizes)
        points.append((tokens, min(per_batch)))
        ray.kill(batch_server)
    per_batch_s, per_token_s = line(points)
    return {"batch_server_s_per_batch": per_batch_s, "batch_server_s_per_token": per_token_s}


def _identity(table: pa.Table) -> pa.Table:
    return table


def task_cost(_: DataConfig) -> dict[str, float]:
    """Measure the CPU time that one Ray Data task costs the process that plans it."""
    _ray()
    points = [(float(count), cpu_seconds(partial(_run_tasks, count), 1)) for count in (50, 250)]
    return {"task_s": line(points)[1]}


def _run_tasks(count: int) -> None:
    map_parts([FilePart("", at, at + 1) for at in range(count)], _identity, _MAX_READERS).take_all()


def _fastest_report() -> float:
    return min(seconds(lambda: ray.train.report({"step": 0})) for _ in range(10))


def report_cost(_: DataConfig) -> dict[str, float]:
    """Measure one `ray.train.report` of two workers, which is a barrier."""
    _ray()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            _fastest_report,  # type: ignore[arg-type]
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
            run_config=ray.train.RunConfig(name="scale", storage_path=folder),
        )
        return {"report_s": trainer.fit().return_value}  # type: ignore[attr-defined]


def main(names: list[str]) -> None:
    """Measure the named parts, or all of them, and record the results."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        write_records(path, _BYTES, "text", texts())
        data = DataConfig(data_path=str(path), batch_tokens=_TOKENS)
        keep({"machine": machine(), "date": str(date.today()), "tokens": _TOKENS})
        for name, measure in _PARTS.items():
            if not names or name in names:
                keep(measure(data))


def keep(measured: dict[str, Any]) -> None:
    """Merge figures into the results file; of a cost or a speed keep the better value."""
    print(measured, flush=True)
    recorded = json.loads(_COSTS.read_text(encoding="utf-8")) if _COSTS.is_file() else {}
    if recorded.get("machine") not in (None, machine()):
        recorded = {}
    for name, value in measured.items():
        better = max if name in _SPEEDS else min if "_s_per_" in name or name.endswith("_s") else None
        recorded[name] = better(value, recorded[name]) if better and name in recorded else value
    _COSTS.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


_PARTS: dict[str, Callable[[DataConfig], dict[str, Any]]] = {
    "reading": reading,
    "batching": batching,
    "reducing": lambda _: reducing(),
    "stepping": lambda _: stepping(),
    "feeding": feeding,
    "tasks": task_cost,
    "report": report_cost,
}

if __name__ == "__main__":
    main(sys.argv[1:])
