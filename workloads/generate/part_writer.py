"""The Ray Data actor that decodes input shards and writes their part files."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from parallelmind.data.files import FilePart
from parallelmind.errors import UserError
from parallelmind.storage import atomic_file
from workloads.common import resources
from workloads.generate.dataset import InputShard
from workloads.generate.decoder import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """Settings of every worker.

    load_kwargs: arguments of `load_model_with_lora`.
    """

    folder: Path
    load_kwargs: dict[str, Any]
    sampling: dict[str, Any]
    reduce: str | None
    use_gpu: bool


class PartWriter:
    """Decodes one shard per call and returns a JSON report.

    UserErrors are returned in the report: Ray would wrap them, or repeat the task, if they were raised.
    """

    def __init__(self, config: WorkerConfig) -> None:
        resources.use_reserved_cpus()
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
        self.config, self.error = config, ""
        try:
            self.decoder = Decoder.load(
                config.load_kwargs, config.sampling, config.reduce, use_gpu=config.use_gpu
            )
        except UserError as error:
            self.error = str(error)

    def __call__(self, table: pa.Table) -> pa.Table:
        (task,) = table.to_pylist()
        report = {} if self.error else self._write_part(**task)
        return pa.Table.from_pylist([{"report": json.dumps({**report, "error": self.error})}])

    def _write_part(self, index: int, part: dict[str, Any], **line_counts: int) -> dict[str, Any]:
        """Write the part file of one shard, which appears only when it is complete. Returns the report."""
        shard = InputShard(FilePart(**part), **line_counts)
        samples, skipped, tokens_before = 0, list[tuple[str, str]](), self.decoder.tokens
        try:
            with atomic_file(part_file(self.config.folder, index)) as file:
                for result in chain.from_iterable(self.decoder.decode(shard.read())):
                    if result.skip_reason:
                        skipped.append((result.line.location, result.skip_reason))
                    else:
                        file.write(json.dumps(result.to_row(), ensure_ascii=False) + "\n")
                        samples += 1
        except (OSError, UserError) as error:
            self.error = (
                f"num_workers: a worker cannot read or write a file ({error}); "
                "give paths that exist on every node of the cluster, on disks with free space"
            )
        return {"samples": samples, "tokens": self.decoder.tokens - tokens_before, "skipped": skipped}


def part_file(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05}.jsonl"
