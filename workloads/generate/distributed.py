"""Generate from files on a Ray cluster: each worker has an engine, each input shard gives one part file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
import ray.data

from parallelmind import cli
from parallelmind.errors import UserError, translate_write_errors
from workloads.common import cluster, resources
from workloads.generate.config import GenerateConfig
from workloads.generate.dataset import InputDataset, open_dataset
from workloads.generate.manifest import OutputManifest, run_settings
from workloads.generate.output_file import exclusive_lock
from workloads.generate.part_writer import PartWriter, WorkerConfig, part_file
from workloads.generate.progress import ProgressStats


def generate_on_cluster(config: GenerateConfig) -> None:
    """Write the part files that do not exist yet.

    Raises UserError for invalid settings and for a folder that cannot be written or resumed.
    """
    folder = Path(config.run.output_path or "").absolute()
    if folder.is_file():
        raise UserError(
            f"output_path={folder}: is a file, and num_workers={config.run.num_workers} fills a folder; "
            "choose another name"
        )
    dataset = open_dataset(config.input.data_path or "", folder)
    with translate_write_errors("output_path", folder):
        folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder):
        _write_folder(config, dataset, folder)


def _write_folder(config: GenerateConfig, dataset: InputDataset, folder: Path) -> None:
    """Start or resume the output folder, which exists."""
    _remove_temporary_files(folder)
    resumes = _open_manifest(OutputManifest(folder, run_settings(config, dataset)))
    files = [part_file(folder, index) for index in range(len(dataset.shards))]
    missing = [index for index, file in enumerate(files) if not file.exists()]
    if files and not missing:
        print(f"already complete: {folder}; choose another output_path, or remove it", file=sys.stderr)
        return
    if resumes:
        print(f"resuming with {len(missing)} of {len(files)} parts in {folder}", file=sys.stderr)
    tasks = [{"index": index, **asdict(dataset.shards[index])} for index in missing]
    stats = ProgressStats(sum(task["samples"] for task in tasks))
    with cli.progress("generating", stats.total) as report_progress:
        for report in _run_tasks(config, folder, tasks) if tasks else ():
            stats.samples += report["samples"]
            stats.tokens += report["tokens"]
            for location, reason in report["skipped"]:
                stats.report_skip(location, reason)
            report_progress(stats.processed, stats.progress_line)
    _remove_temporary_files(folder)
    if lost := [file for file in files if not file.exists()]:
        raise UserError(
            f"output_path={folder}: {len(lost)} of {len(files)} parts are not in it, as workers have written "
            "them to disks of their own; give a path that all nodes of the cluster share"
        )
    stats.report_end(config.input.data_path or "", has_rows=any(file.stat().st_size for file in files))


def _open_manifest(manifest: OutputManifest) -> bool:
    """Create the manifest of an empty folder, or check that of a filled one. True if the folder is filled."""
    if any(manifest.output.iterdir()):
        manifest.check_resumable()
        return True
    manifest.create()
    return False


def _run_tasks(config: GenerateConfig, folder: Path, tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Run the tasks on Ray workers and yield the report of each part as it completes.

    Ray repeats the task of a lost worker. Raises UserError for the first part that cannot be written.
    """
    cluster.connect(config.run.ray_address)
    workers = min(config.run.num_workers, len(tasks))
    use_gpu = config.model.use_gpu is True
    worker_config = WorkerConfig(
        folder=folder,
        load_kwargs=config.model.load_kwargs(),
        sampling=config.sampling.to_kwargs(),
        reduce=config.input.reduce,
        use_gpu=use_gpu,
    )
    reports = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        PartWriter,
        fn_constructor_args=[worker_config],
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=resources.cpus_per_worker(workers, use_gpu),
        num_gpus=int(use_gpu),
        # One task in flight per actor: no part waits behind another one for a busy actor.
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
    )
    # Without prefetching, so that a part is reported as soon as it is complete.
    for batch in reports.iter_batches(batch_size=None, prefetch_batches=0):
        for report in map(json.loads, batch["report"]):
            if report["error"]:
                raise UserError(report["error"])
            yield report


def _remove_temporary_files(folder: Path) -> None:
    """Remove the unfinished part files of workers that were killed."""
    for file in folder.glob(".part-*"):
        file.unlink()
