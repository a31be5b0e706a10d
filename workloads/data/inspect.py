"""Look at a file before training on it.

    python -m workloads.convert --inspect FILE [key=value …]
    python -m workloads.convert --inspect train.jsonl batch_size=8 max_branch_tokens=256 show=5

Prints what the file holds and which lines are bad; how long mains, branches and samples are; what the length
limits cost; how much of the batches that training would build at these settings is padding; and the first
samples as columns, with time running across and targets marked. The histograms are also written as a PNG.
Samples are shuffled as in training; shuffle_window=1 keeps the file's order.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.text import Text

from parallelmind import cli
from parallelmind.config import DataConfig, GroupedConfig, ModelConfig, RopeConfig, resolve
from parallelmind.data.files import file_parts, find_files
from parallelmind.data.lines import Line, read_lines
from parallelmind.data.packing import EpochSeed, SampleBatch, TokenRecord, sample_batches
from parallelmind.data.records import Record
from parallelmind.data.statistics import Statistics, buckets, percentiles
from parallelmind.data.survey import BadLine, Survey, check_line
from parallelmind.data.tokenise import tokenise_stream
from parallelmind.errors import UserError, translate_write_errors
from parallelmind.layout import Ints, Layout, Tokens, arrange
from parallelmind.model.base_model import load_tokenizer
from workloads.data.inspect_report import print_lengths, print_lines, print_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedTokenizerBase

_PLAIN_WIDTH = 120  # where the output is no terminal
_BATCH_BARS = 40


class InspectConfig(GroupedConfig):
    """Inspection. `validation_path` is not read; give it as `data_path`."""

    model: ModelConfig
    rope: RopeConfig
    data: DataConfig
    show: int = Field(2, ge=0, description="samples to print as columns")
    png_path: str | None = Field(
        None, description="picture of the histograms; null: the file's name + .png in this folder"
    )
    max_records: int | None = Field(10000, ge=1, description="records to look at, from the start; null: all")


class Look:
    """What one pass over the files found; `read` fills it."""

    def __init__(self, config: InspectConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.survey, self.statistics = Survey(), Statistics()
        self.complete = True
        self.samples: list[tuple[Tokens, Ints]] = []

    def read(self, lines: Iterable[tuple[str, int, Line]]) -> None:
        for group in self._groups(self._rows(self._records(lines))):
            self.statistics.add_batch(group.samples)
            room = self.config.show - len(self.samples)
            self.samples += list(zip(group.samples, group.delays, strict=True))[:room]

    def _groups(self, rows: Iterable[TokenRecord]) -> Iterator[SampleBatch]:
        return sample_batches(rows, self.config.data, EpochSeed(0))

    def _rows(self, records: Iterator[Record]) -> Iterator[TokenRecord]:
        for item in tokenise_stream(records, self.tokenizer, self.config.data):
            self.statistics.add_record(item)
            yield from item.for_packing()

    def _records(self, lines: Iterable[tuple[str, int, Line]]) -> Iterator[Record]:
        survey = self.survey
        for file, number, line in lines:
            found = check_line(line, self.config.data, len(self.tokenizer))
            if found is None:
                continue
            if survey.records == self.config.max_records:
                self.complete = False
                return
            survey.lines += 1
            if isinstance(found, Record):
                survey.records += 1
                survey.branches += len(found.branches)
                survey.standalone += found.standalone
                survey.unknown_keys.update(found.unknown_keys)
                yield found
            else:
                survey.bad.append(BadLine(file, line.offset, number, found))

    def refuse_empty(self) -> None:
        """Raises UserError where training would have nothing to train on."""
        config = self.config.data
        if not self.survey.records:
            self.survey.raise_if_unusable(config, "data_path")
        if not self.statistics.branch_tokens:
            raise UserError(
                f"max_branch_tokens={config.max_branch_tokens} max_sample_tokens={config.max_sample_tokens} "
                f"overlong={config.overlong}: leave none of {self.survey.branches:,} branches; raise the limits, "
                "set overlong=truncate, or lower the answer offsets"
            )

    def layouts(self) -> Iterator[Layout]:
        return (arrange(tokens, self.config.rope, delays) for tokens, delays in self.samples)


def main(argv: list[str]) -> None:
    if cli.wants_help(argv):
        cli.print_help(__doc__ or "", InspectConfig)
        return
    config = _config(argv)
    files = find_files(config.data.data_path)
    look = Look(config, load_tokenizer(config.model))
    look.read(_tracked(numbered_lines(files), config.max_records))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    print_lines(look.survey, look.complete, console)
    look.refuse_empty()
    print_lengths(look.statistics, console)
    print_samples(look.layouts(), look.tokenizer, console)
    path = Path(config.png_path or f"{_file_name(config.data.data_path)}.png")
    write_png(look.statistics, config.data.data_path, path)
    console.print(Text(f"\nhistograms: {path}"))
    look.survey.raise_if_unusable(config.data, "data_path")


def _config(argv: Sequence[str]) -> InspectConfig:
    files, dotlist = cli.split_args(argv)
    dotlist = [*(f"data_path={file}" for file in files), *dotlist]
    given = [item for item in dotlist if item.startswith("data_path=")]
    if len(given) > 1:
        raise UserError(
            f"{given[1]}: a second file beside {given[0]}; give one, a folder, or several with commas between"
        )
    return resolve(InspectConfig, {}, dotlist, source="command line")


def _file_name(data_path: str) -> str:
    """The last part of a path, a URL or a glob, as the name of a file here."""
    last = data_path.split(",")[0].rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "_", last) if last.strip(".") else "data"


def numbered_lines(files: Sequence[str]) -> Iterator[tuple[str, int, Line]]:
    """(file, number within it from 1, line) of every line."""
    for file in files:
        for number, line in enumerate(chain.from_iterable(map(read_lines, file_parts([file]))), start=1):
            yield file, number, line


def _tracked(lines: Iterable[tuple[str, int, Line]], total: int | None) -> Iterator[tuple[str, int, Line]]:
    """A bar on a terminal, a line now and then elsewhere."""
    started = time.monotonic()
    return cli.tracked(
        lines, "reading", total, lambda n: f"{n} lines read; {n / (time.monotonic() - started):.0f} lines/s"
    )


def write_png(found: Statistics, title: str, path: Path) -> None:
    """Three panels: tokens per branch, branches per sample, tokens and padding per batch. Raises
    UserError.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), layout="constrained")
    figure.suptitle(title, parse_math=False)
    left, middle, right = figure.subplots(1, 3)
    _draw_histogram(left, found.branch_tokens, "tokens per branch", "branches")
    _draw_histogram(middle, found.sample_branches, "branches per sample", "samples")
    _draw_batches(right, found)
    with translate_write_errors("png_path", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(path)


def _draw_histogram(axes: Axes, values: Sequence[int], title: str, counted: str) -> None:
    found = buckets(values)
    median, *_, most = percentiles(values)
    axes.bar([bucket.label for bucket in found], [bucket.count for bucket in found], width=0.9)
    axes.set(
        title=f"{title.capitalize()} (median {median:,}, max {most:,})",
        xlabel=title,
        ylabel=f"number of {counted}",
    )
    axes.tick_params(axis="x", rotation=30 if len(found[-1].label) > 2 else 0)


def _draw_batches(axes: Axes, found: Statistics) -> None:
    order = np.argsort(found.batch_places, kind="stable")
    parts = np.array_split(order, min(_BATCH_BARS, len(order)))
    counts = np.array([found.batch_tokens, found.batch_places])
    tokens, places = np.array([counts[:, part].mean(axis=1) for part in parts]).T
    ends = 100 * np.cumsum([len(part) for part in parts]) / len(order)
    widths = np.diff(ends, prepend=0)
    axes.bar(ends, tokens, -widths, align="edge", label="tokens")
    axes.bar(ends, places - tokens, -widths, bottom=tokens, align="edge", label="padding", color="lightgrey")
    axes.set_title(f"Padding is {found.padding:.1%} of all places ({len(order):,} batches)")
    axes.set(
        xlabel="batches from smallest to largest, in percent", ylabel="places per batch (tokens + padding)"
    )
    axes.legend(loc="upper left")
