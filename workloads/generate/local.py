"""Generate from files in this process, into one file or to stdout."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from parallelmind import cli, hardware
from parallelmind.data.files import COMPRESSIONS
from parallelmind.errors import UserError, translate_write_errors
from parallelmind.storage import fsync, write_line
from workloads.common.empty_answers import ended_at_once
from workloads.generate.config import GenerateConfig
from workloads.generate.dataset import InputDataset, open_dataset
from workloads.generate.decoder import Decoder
from workloads.generate.manifest import OutputManifest, run_settings
from workloads.generate.output_file import exclusive_lock, find_last_row
from workloads.generate.progress import ProgressStats
from workloads.generate.results import LineResult

WriteRow = Callable[[str], None]


def generate_in_process(config: GenerateConfig) -> None:
    """Decode all lines of `data_path`; resume an output that exists already.

    Raises UserError for invalid settings and for an output that cannot be written or resumed. A line that
    cannot be continued is reported and skipped.
    """
    data_path = config.input.data_path or ""
    if config.run.output_path is None:
        _decode(config, open_dataset(data_path, output=None), functools.partial(print, flush=True))
        return
    output = Path(config.run.output_path).absolute()
    if output.is_dir():
        raise UserError(
            f"output_path={output}: is a folder, and num_workers=0 writes a file; choose another name"
        )
    if output.suffix in COMPRESSIONS:
        raise UserError(
            f"output_path={output}: rows are added to the file, which {output.suffix} does not allow; "
            f"choose {output.with_suffix('').name}"
        )
    dataset = open_dataset(data_path, output)
    with translate_write_errors("output_path", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    with exclusive_lock(output):
        _write_file(config, dataset, output)


def _write_file(config: GenerateConfig, dataset: InputDataset, output: Path) -> None:
    """Start or resume the output file, which exists."""
    manifest = OutputManifest(output, run_settings(config, dataset))
    rows = last_line = end = 0
    if size := output.stat().st_size:
        if manifest.check_resumable() == size:
            print(f"already complete: {output}; choose another output_path, or remove it", file=sys.stderr)
            return
        rows, last_line, end = find_last_row(output)
        print(f"resuming after line {last_line}, with {rows} rows in {output}", file=sys.stderr)
    else:
        manifest.create()

    def write_row(row: str) -> None:
        nonlocal end
        with translate_write_errors("output_path", output):
            end = write_line(output, end, row.encode() + b"\n", sync=False)

    _decode(config, dataset, write_row, last_line, rows)
    with translate_write_errors("output_path", output):
        os.truncate(output, end)  # without rows to add, the part of a row would stay
        fsync(output)
    manifest.mark_finished(end)


def _decode(
    config: GenerateConfig, dataset: InputDataset, write_row: WriteRow, after: int = 0, existing_rows: int = 0
) -> None:
    """Decode the lines whose number is greater than `after`."""
    hardware.use_available_cpus()
    decoder = Decoder.load(
        config.model.load_kwargs(),
        config.sampling.to_kwargs(),
        config.input.reduce,
        use_gpu=config.model.use_gpu is True,
    )
    stats = ProgressStats(dataset.count(after))
    with cli.progress("generating", stats.total) as report_progress:
        for results in decoder.decode(dataset.read(after)):
            stats.tokens = decoder.tokens
            for result in results:
                _write_result(result, stats, write_row)
            report_progress(stats.processed, stats.progress_line)
    stats.report_end(config.input.data_path or "", has_rows=existing_rows + stats.samples > 0)
    if stats.empty:
        subject = f"{stats.empty} outputs"
        line = ended_at_once(subject, config.model.lora_path, bool(config.sampling.stop))
        print(line, file=sys.stderr)


def _write_result(result: LineResult, stats: ProgressStats, write_row: WriteRow) -> None:
    if result.skip_reason:
        stats.report_skip(result.line.location, result.skip_reason)
    else:
        write_row(json.dumps(result.to_row(), ensure_ascii=False))
        stats.samples += 1
        stats.empty += result.num_empty
