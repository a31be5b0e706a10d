"""What a batch costs each part of the platform, for `experiments/005_scale.py`.

`XQUAD=… python -m benchmarks.scale [PART …]` measures all parts, or some. Costs of one process are its
processor time, what waits for others (gloo, a report to Ray Train) is wall clock. The best of all runs on a
machine is kept: other work there can only slow a part down.
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
from benchmarks.harness import RESULTS, machine, seconds
from benchmarks.scale_step import cpu_seconds, line, reducing, stepping
from benchmarks.text import texts, tokenizer
from parallelmind.config import DataConfig, RopeConfig
from parallelmind.data.batch_server import BatchServer, ShardAssignment
from parallelmind.data.files import Part, file_parts
from parallelmind.data.packing import SampleBatch, Seeds, groups
from parallelmind.data.pipeline import _dataset, feed, read_part
from parallelmind.data.survey import survey_part
from parallelmind.data.tables import to_rows, to_table

_TOKENS = 16384  # of a worker's batch, padding included
_BYTES = 4 << 20
_SPEEDS = ("gloo_bytes_per_s", "cpu_flops")
_COSTS = RESULTS.parent / "005_scale.costs.json"


@cache
def tables(data: DataConfig) -> list[pa.Table]:
    return [to_table(read_part(part, tokenizer(), data)) for part in file_parts([data.data_path])]


def batches(data: DataConfig) -> list[SampleBatch]:
    return list(groups(to_rows(tables(data), Counter()), data, Seeds(0)))


def reading(data: DataConfig) -> dict[str, float]:
    """The survey, tokenising, and what a token takes on its way. A part is as much as one task reads."""
    part = file_parts([data.data_path])[0]
    table = to_table(read_part(part, tokenizer(), data))
    tokens, size = table.column("ids").combine_chunks().values.__len__(), part.end - part.start
    return {
        "bytes_per_token": size / tokens,
        "arrow_bytes_per_token": table.nbytes / tokens,
        "survey_s_per_byte": cpu_seconds(lambda: survey_part(part, data, None)) / size,
        "tokenise_s_per_token": cpu_seconds(lambda: to_table(read_part(part, tokenizer(), data))) / tokens,
    }


def batching(data: DataConfig) -> dict[str, Any]:
    """Layout in the worker; how unequal batches are; how many tokens one sees, columnar."""
    ready = batches(data)
    some = ready[:8]
    places = [max(len(one.ids) for one in group.samples) * len(group.samples) for group in ready]
    lengths = np.array([len(one.ids) for group in ready for one in group.samples], float)
    return {
        "layout_s_per_token": cpu_seconds(lambda: [group.batch(RopeConfig(), 0) for group in some])
        / sum(map(_tokens, some)),
        "padding_share": float(1 - lengths.sum() / sum(places)),
        "seen_per_token": float((lengths**2).sum() / 2 / lengths.sum()),
        "places": [round(float(at) / _TOKENS, 3) for at in np.quantile(places, np.linspace(0, 1, 21))],
        "places_at_batch_size_4": _spread(data.model_copy(update={"batch_tokens": None})),
    }


def _tokens(group: SampleBatch) -> int:
    return sum(len(one.ids) for one in group.samples)


def _spread(data: DataConfig) -> float:
    """Standard deviation over mean of the places of batches."""
    places = [max(len(one.ids) for one in group.samples) * len(group.samples) for group in batches(data)]
    return float(np.std(places) / np.mean(places))


@cache
def _ray() -> None:
    start_ray(cpus=2)


class _Timed(BatchServer):
    def spent(self) -> float:
        return time.process_time()


def feeding(data: DataConfig) -> dict[str, float]:
    """Processor time of the feeder's process: shuffle, group, send. A line through batches of two sizes."""
    _ray()
    points = []
    for size in (_TOKENS // 8, _TOKENS):
        config = data.model_copy(update={"batch_tokens": size})
        read = [*tables(data)]
        feeder: Any = (
            ray.remote(_Timed)
            .options(num_cpus=0.2, max_concurrency=4)
            .remote(lambda read=read: iter(read), config, 0)
        )
        list(feed(feeder, ShardAssignment("", 0, 0, 1), 0, Counter()))
        per_batch, tokens = [], 0.0
        for epoch in (1, 2):
            start = ray.get(feeder.spent.remote())
            found = [_tokens(group) for group in feed(feeder, ShardAssignment("", epoch, 0, 1), 0, Counter())]
            per_batch.append((ray.get(feeder.spent.remote()) - start) / len(found))
            tokens = sum(found) / len(found)
        points.append((tokens, min(per_batch)))
        ray.kill(feeder)
    batch, token = line(points)
    return {"feeder_s_per_batch": batch, "feeder_s_per_token": token}


def _nothing(table: pa.Table) -> pa.Table:
    return table


def task_cost(_: DataConfig) -> dict[str, float]:
    """Processor time that a task of Ray Data takes in the process that plans it."""
    _ray()
    points = [(float(count), cpu_seconds(partial(_tasks, count), 1)) for count in (50, 250)]
    return {"task_s": line(points)[1]}


def _tasks(count: int) -> None:
    _dataset([Part("", at, at + 1) for at in range(count)], _nothing).take_all()


def _report_often() -> float:
    return min(seconds(lambda: ray.train.report({"step": 0})) for _ in range(10))


def report_cost(_: DataConfig) -> dict[str, float]:
    """Of one `ray.train.report` by two workers, which is a barrier."""
    _ray()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TorchTrainer(
            _report_often,  # type: ignore[arg-type]
            scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
            run_config=ray.train.RunConfig(name="scale", storage_path=folder),
        )
        return {"report_s": trainer.fit().return_value}  # type: ignore[attr-defined]


def main(only: list[str]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        write_records(path, _BYTES, "text", texts())
        data = DataConfig(data_path=str(path), batch_tokens=_TOKENS)
        keep({"machine": machine(), "date": str(date.today()), "tokens": _TOKENS})
        for name, measure in _PARTS.items():
            if not only or name in only:
                keep(measure(data))


def keep(found: dict[str, Any]) -> None:
    """Beside what was measured before, and the better of both for a cost or a speed."""
    print(found, flush=True)
    known = json.loads(_COSTS.read_text(encoding="utf-8")) if _COSTS.is_file() else {}
    if known.get("machine") not in (None, machine()):
        known = {}
    for name, value in found.items():
        better = max if name in _SPEEDS else min if "_s_per_" in name or name.endswith("_s") else None
        known[name] = better(value, known[name]) if better and name in known else value
    _COSTS.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
