"""The table of supported model types, for `python -m workloads.evaluate support`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils import logging

from parallelmind import cli
from parallelmind.config import FrozenConfig
from parallelmind.errors import UserError, translate_write_errors
from parallelmind.evaluation.model_support import COLUMNS, FALLBACK, SupportRow, check_model_types
from parallelmind.evaluation.tiny_models import causal_lm_types

_GENERATED = "<!-- generated: everything below comes from `python -m workloads.evaluate support` -->"


class SupportConfig(FrozenConfig):
    """One run of `evaluate support`."""

    model_types: str | None = Field(
        None, description="types to check_model_types, comma-separated; null: all"
    )
    csv: bool = Field(False, description="print comma-separated values (--csv will do) in place of a table")
    output_path: str | None = Field(None, description="Markdown file whose generated part becomes the table")


def support(argv: list[str]) -> None:
    config = cli.parse(SupportConfig, argv)
    chosen = _chosen(config.model_types)
    logging.set_verbosity_error()  # tiny models have no checkpoints, kernels or padding to be warned of
    console = Console(stderr=True)
    progress = track(
        check_model_types(chosen),
        "holding models against the laws",
        len(chosen),
        console=console,
        disable=not console.is_terminal,
    )
    rows = list(progress)
    if config.output_path:
        _write_markdown(Path(config.output_path), rows)
    if config.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([COLUMNS, *(row.cells() for row in rows)])
    else:
        _print_table(rows)


def _chosen(names: str | None) -> list[str]:
    known = causal_lm_types()
    wanted = known if names is None else [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            raise UserError(
                f"model_types={name}: no causal LM of the installed transformers; leave model_types out for all"
            )
    return wanted


def _print_table(rows: Sequence[SupportRow]) -> None:
    drawn = Table(*COLUMNS)
    for row in rows:
        drawn.add_row(*row.cells())
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(drawn)
    print(summary(rows))


def summary(rows: Sequence[SupportRow]) -> str:
    """Counts, in one line."""
    held = sum(row.supported for row in rows)
    fallback = sum(FALLBACK in row.laws for row in rows)
    return f"{held} of {len(rows)} types hold parallel branches; {fallback} more decode them one row each"


def _write_markdown(path: Path, rows: Sequence[SupportRow]) -> None:
    """Keep what is written by hand, up to and with the marker line."""
    written = path.read_text(encoding="utf-8") if path.exists() else f"{_GENERATED}\n"
    if _GENERATED not in written:
        raise UserError(f"output_path={path}: has no line {_GENERATED}; add it where the table should begin")
    lines = [
        "| " + " | ".join(text.replace("|", "/") for text in texts) + " |"
        for texts in (COLUMNS, *(row.cells() for row in rows))
    ]
    rule = "|" + " --- |" * len(COLUMNS)
    by_hand = written[: written.index(_GENERATED) + len(_GENERATED)]
    with translate_write_errors("output_path", path):
        path.write_text(
            "\n".join([by_hand, "", f"{summary(rows)}.", "", lines[0], rule, *lines[1:]]) + "\n",
            encoding="utf-8",
        )
