"""`evaluate support`: the table of model types that hold parallel branches."""

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
from parallelmind.config import FrozenConfig, OutputPath
from parallelmind.errors import UserError, translate_read_errors, translate_write_errors
from parallelmind.evaluation.model_support import COLUMNS, FALLBACK, SupportRow, check_model_types
from parallelmind.evaluation.tiny_models import causal_lm_types
from parallelmind.storage import atomic_file
from workloads.evaluate.output import console

_MARKER = "<!-- generated: everything below comes from `python -m workloads.evaluate support` -->"
_PLAIN_WIDTH = 200  # columns of the table where stdout is no terminal


class SupportConfig(FrozenConfig):
    """Model types and output."""

    model_types: str | None = Field(None, description="model types to check, comma-separated; null: all")
    csv: bool = Field(False, description="print comma-separated values instead of a table; also as --csv")
    output_path: OutputPath | None = Field(
        None, description="Markdown file; the table replaces everything below its marker line"
    )


def evaluate_support(argv: list[str]) -> None:
    """Check the model types; print the table, and write it to a Markdown file if requested."""
    config = cli.parse(SupportConfig, argv)
    model_types = _parse_model_types(config.model_types)
    kept = text_above_table(Path(config.output_path)) if config.output_path else ""
    logging.set_verbosity_error()  # tiny models cause warnings about checkpoints, kernels and padding
    stderr = Console(stderr=True)
    rows = list(
        track(
            check_model_types(model_types),
            "checking model types",
            len(model_types),
            console=stderr,
            disable=not stderr.is_terminal,
        )
    )
    if config.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([COLUMNS, *(row.cells() for row in rows)])
    else:
        _print_table(rows)
    if config.output_path:
        write_markdown(Path(config.output_path), kept, rows)


def _parse_model_types(names: str | None) -> list[str]:
    known = causal_lm_types()
    if names is None:
        return known
    model_types = [name.strip() for name in names.split(",") if name.strip()]
    for name in model_types:
        if name not in known:
            raise UserError(
                f"model_types={name}: is no causal LM of the installed transformers; "
                "leave model_types out for all types"
            )
    return model_types


def _print_table(rows: Sequence[SupportRow]) -> None:
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row.cells())
    console(_PLAIN_WIDTH).print(table)
    print(summary(rows))


def summary(rows: Sequence[SupportRow]) -> str:
    """Number of supported types and of types with the fallback, as one line."""
    supported = sum(row.supported for row in rows)
    fallback = sum(FALLBACK in row.laws for row in rows)
    return (
        f"{supported} of {len(rows)} types hold parallel branches; {fallback} more decode them one row each"
    )


def text_above_table(path: Path) -> str:
    """The text of a Markdown file up to the marker line, that line included.

    Raises UserError if the file exists and cannot be read, or has no marker line.
    """
    if not path.exists():
        return _MARKER
    with translate_read_errors("output_path", path):
        text = path.read_text(encoding="utf-8")
    if _MARKER not in text:
        raise UserError(f"output_path={path}: has no line {_MARKER}; add it where the table should begin")
    return text[: text.index(_MARKER) + len(_MARKER)]


def write_markdown(path: Path, kept: str, rows: Sequence[SupportRow]) -> None:
    """Write the text that is kept, and the table below it."""
    header, *lines = [
        "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"
        for cells in (COLUMNS, *(row.cells() for row in rows))
    ]
    rule = "|" + " --- |" * len(COLUMNS)
    parts = [kept, "", f"{summary(rows)}.", "", header, rule, *lines]
    with translate_write_errors("output_path", path), atomic_file(path) as file:
        file.write("\n".join(parts) + "\n")
