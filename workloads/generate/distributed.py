"""Continuing files on a Ray cluster: an engine in every worker, a part of the input at a time, a file for
every part.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
import pyarrow as pa
import ray.data
import torch

from parallelmind import cli
from parallelmind.data.files import Part
from parallelmind.errors import UserError, writing
from parallelmind.storage import atomic_file
from workloads.common import cluster, resources
from workloads.generate.batch import Decoder, ProgressStats
from workloads.generate.config import GenerateConfig
from workloads.generate.output import OutputManifest, alone_at, read_source, settings_of
from workloads.generate.source import Source, Stretch


@dataclass(frozen=True, slots=True)
class Task:
    """What every worker needs to know. model: keywords of `load_model_with_lora`; threads: of each worker."""

    folder: Path
    model: dict[str, Any]
    sampling: dict[str, Any]
    reduce: str | None
    threads: int
    gpu: bool


class PartWriter:
    """What an actor of Ray Data does. Errors that the user can mend travel as values: Ray would wrap them, or
    try again.
    """

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(min(task.threads, os.cpu_count() or 1))
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
        self.task, self.error = task, ""
        try:
            self.decoder = Decoder.load(task.model, task.sampling, task.reduce, task.gpu)
        except UserError as error:
            self.error = str(error)

    def __call__(self, table: pa.Table) -> pa.Table:
        (given,) = table.to_pylist()
        told = {} if self.error else self._write(**given)
        return pa.Table.from_pylist([{"told": json.dumps({**told, "error": self.error})}])

    def _write(self, index: int, part: dict[str, Any], **counts: int) -> dict[str, Any]:
        """Write a part, whole or not at all; returns what came of it."""
        samples, bad, tokens = 0, list[tuple[str, str]](), self.decoder.tokens
        try:
            with atomic_file(_part_file(self.task.folder, index)) as file:
                for result in chain.from_iterable(
                    self.decoder.run(Stretch(Part(**part), **counts).entries())
                ):
                    if result.problem:
                        bad.append((result.entry.place, result.problem))
                    else:
                        file.write(json.dumps(result.row(), ensure_ascii=False) + "\n")
                        samples += 1
        except OSError as error:
            self.error = f"num_workers: a worker cannot use a file ({error}); give paths that every node of the cluster has"
        return {"samples": samples, "tokens": self.decoder.tokens - tokens, "bad": bad}


def continue_files(config: GenerateConfig) -> None:
    """Write the parts that are not there yet. Raises UserError for what the user can mend."""
    folder = Path(config.output_path or "").expanduser().absolute()
    if folder.is_file():
        raise UserError(
            f"output_path={folder}: is a file, and num_workers={config.num_workers} fills a folder; choose another name"
        )
    source = read_source(config, folder)
    with writing("output_path", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with alone_at(folder):
        _fill(config, source, folder)


def _fill(config: GenerateConfig, source: Source, folder: Path) -> None:
    _remove_scratch(folder)
    note, known = OutputManifest(folder, settings_of(config, source)), any(folder.iterdir())
    if known:
        note.go_on()
    else:
        note.begin()
    files = [_part_file(folder, index) for index in range(len(source.stretches))]
    missing = [index for index, file in enumerate(files) if not file.exists()]
    if files and not missing:
        print(f"finished before: {folder}; choose another output_path, or remove it", file=sys.stderr)
        return
    if known:
        print(f"going on with {len(missing)} of {len(files)} parts in {folder}", file=sys.stderr)
    items = [{"index": index, **asdict(source.stretches[index])} for index in missing]
    tally = ProgressStats(sum(item["samples"] for item in items))
    with cli.progress("generating", tally.total) as tell:
        for told in _told(config, folder, items) if items else ():
            tally.samples += told["samples"]
            tally.tokens += told["tokens"]
            for place, problem in told["bad"]:
                tally.skip(place, problem)
            tell(tally.done, tally.line)
    _remove_scratch(folder)
    tally.end(config.data_path or "", any(file.stat().st_size for file in files))


def _told(config: GenerateConfig, folder: Path, items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What workers tell of each part, as they end. Raises UserError for the first that one of them could not
    write.

    Ray begins a part again whose worker was lost.
    """
    cluster.connect(config.ray_address)
    workers = min(config.num_workers, len(items))
    gpu = resources.capacity("GPU") >= workers
    threads = resources.threads_per_process(workers)
    parts = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        PartWriter,
        fn_constructor_args=[
            Task(folder, config.model_kwargs(), config.sampling_kwargs(), config.reduce, threads, gpu)
        ],
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=resources.cpus_per_worker(workers),
        num_gpus=int(gpu),
        compute=ray.data.ActorPoolStrategy(
            size=workers, max_tasks_in_flight_per_actor=1
        ),  # no part waits for a busy one
    )
    for batch in parts.iter_batches(
        batch_size=None, prefetch_batches=0
    ):  # prefetching, it would tell of them one late
        for told in map(json.loads, batch["told"]):
            if told["error"]:
                raise UserError(told["error"])
            yield told


def _remove_scratch(folder: Path) -> None:
    """What workers left that were killed."""
    for left in folder.glob(".part-*"):
        left.unlink()


def _part_file(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05}.jsonl"
