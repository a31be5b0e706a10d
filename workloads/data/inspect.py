"""Inspect a file before training on it.

    python -m workloads.convert --inspect FILE [key=value …]
    python -m workloads.convert --inspect train.jsonl batch_size=8 max_branch_tokens=256 show=5

Prints the content of the file and its bad lines; the lengths of mains, branches, reduces and samples; what
the length limits cost; the share of padding in the batches that training would build with these settings; and
the first samples as columns, with time running across, one line for every segment, and targets marked. The
histograms are also written as a PNG.
Samples are shuffled as in training; shuffle_window=1 keeps the file's order.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.text import Text

from parallelmind import cli
from parallelmind.config import DataConfig, GroupedConfig, ModelConfig, OutputPath, RopeConfig, resolve
from parallelmind.data.files import find_files
from parallelmind.data.tokenise import limit_notes
from parallelmind.errors import UserError
from parallelmind.model.base_model import load_tokenizer
from parallelmind.model.vocabulary import check_vocabulary
from parallelmind.outputs import check_output
from workloads.data.inspect_plots import write_png
from workloads.data.inspect_report import print_lengths, print_lines, print_samples
from workloads.data.inspection import Inspection, NumberedLine, numbered_lines

_PLAIN_WIDTH = 120  # columns, if the output is not a terminal


class InspectConfig(GroupedConfig):
    """Inspection. `validation_path` is not read; give it as `data_path`."""

    model: ModelConfig
    rope: RopeConfig
    data: DataConfig
    show: int = Field(2, ge=0, description="samples to print as columns")
    png_path: OutputPath | None = Field(
        None, description="PNG file of the histograms; null: the file's name + .png in the current folder"
    )
    max_records: int | None = Field(10000, ge=1, description="records to read, from the start; null: all")


def main(argv: list[str]) -> None:
    """Run the command. Raises UserError for anything that the user can correct."""
    if cli.wants_help(argv):
        cli.print_help(__doc__ or "", InspectConfig)
        return
    config = _parse(argv)
    data_path = config.data.data_path
    files = find_files(data_path)
    path = Path(config.png_path or f"{_file_name(data_path)}.png")
    check_output(path, "png_path", data_path=files, base_model=[config.model.base_model])
    tokenizer = load_tokenizer(config.model)
    for note in check_vocabulary(tokenizer, config.model):
        print(f"warning: {note}", file=sys.stderr)
    inspection = Inspection(config.data, tokenizer, config.show, config.max_records)
    inspection.read(_with_progress(numbered_lines(files), config.max_records))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    print_lines(inspection.survey, inspection.complete, console)
    inspection.raise_if_empty()
    print_lengths(inspection.statistics, config.data.packing, console)
    statistics = inspection.statistics
    for note in limit_notes(statistics.truncated, statistics.skipped, config.data):
        print(f"warning: {note}", file=sys.stderr)
    print_samples(inspection.layouts(config.rope), tokenizer, console)
    write_png(inspection.statistics, data_path, path)
    console.print(Text(f"\nhistograms: {path}"))
    inspection.survey.raise_if_unusable(config.data, "data_path")


def _parse(argv: Sequence[str]) -> InspectConfig:
    files, dotlist = cli.split_args(argv)
    dotlist = [*(f"data_path={file}" for file in files), *dotlist]
    data_paths = [item for item in dotlist if item.startswith("data_path=")]
    if len(data_paths) > 1:
        raise UserError(
            f"{data_paths[1]}: a second file beside {data_paths[0]}; "
            "give one file, a folder, or several separated by commas"
        )
    return resolve(InspectConfig, {}, dotlist, source="command line")


def _file_name(data_path: str) -> str:
    """The last component of a path, a URL or a glob, as a valid local file name."""
    last = data_path.split(",")[0].rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "_", last) if last.strip(".") else "data"


def _with_progress(lines: Iterable[NumberedLine], total: int | None) -> Iterator[NumberedLine]:
    """Show progress while the lines are read: a bar on a terminal, plain lines elsewhere."""
    started = time.monotonic()

    def describe(count: int) -> str:
        return f"{count} lines read; {count / (time.monotonic() - started):.0f} lines/s"

    return cli.tracked(lines, "reading", total, describe)
