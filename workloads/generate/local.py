"""Continuing files in this process, into one file or to stdout; a file that was begun is gone on with."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from parallelmind import cli
from parallelmind.errors import UserError, writing
from workloads.generate.batch import Decoder, ProgressStats, Result
from workloads.generate.config import GenerateConfig
from workloads.generate.output import OutputManifest, alone_at, cut_back, read_source, settings_of
from workloads.generate.source import Source


def continue_files(config: GenerateConfig) -> None:
    """Raises UserError for what the user can mend; a line that cannot be continued is reported and left
    out.
    """
    if config.output_path is None:
        return _decode(config, read_source(config, None), functools.partial(print, flush=True))
    output = Path(config.output_path).expanduser().absolute()
    if output.is_dir():
        raise UserError(
            f"output_path={output}: is a folder, and num_workers=0 writes a file; choose another name"
        )
    source = read_source(config, output)
    with writing("output_path", output):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    with alone_at(output):
        _append(config, source, output)
    return None


def _append(config: GenerateConfig, source: Source, output: Path) -> None:
    note, rows, after = OutputManifest(output, settings_of(config, source)), 0, 0
    with open(output, "r+b") as file:

        def write(row: str) -> None:
            with writing("output_path", output):
                file.write(row.encode() + b"\n")
                file.flush()

        if size := output.stat().st_size:
            if note.go_on() == size:
                print(f"finished before: {output}; choose another output_path, or remove it", file=sys.stderr)
                return
            rows, after = cut_back(file, output)
            print(f"going on after line {after}, with {rows} rows in {output}", file=sys.stderr)
        else:
            note.begin()
        _decode(config, source, write, after, rows)
        os.fsync(file.fileno())
        note.finish(file.tell())


def _decode(
    config: GenerateConfig, source: Source, write: Callable[[str], None], after: int = 0, rows: int = 0
) -> None:
    """after: the line after which to begin; rows: those that are there already."""
    decoder = Decoder.load(
        config.model_kwargs(), config.sampling_kwargs(), config.reduce, gpu=torch.cuda.is_available()
    )
    tally = ProgressStats(source.samples(after))
    with cli.progress("generating", tally.total) as tell:
        for results in decoder.run(source.entries(after)):
            tally.tokens = decoder.tokens
            for result in results:
                _take(result, tally, write)
            tell(tally.done, tally.line)
    tally.end(config.data_path or "", rows + tally.samples > 0)


def _take(result: Result, tally: ProgressStats, write: Callable[[str], None]) -> None:
    if result.problem:
        tally.skip(result.entry.place, result.problem)
    else:
        write(json.dumps(result.row(), ensure_ascii=False))
        tally.samples += 1
