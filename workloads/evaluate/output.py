"""Console and output files of the evaluations."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from parallelmind.errors import UserError, translate_write_errors
from parallelmind.outputs import check_output
from parallelmind.storage import atomic_binary_file, atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".json", ".png")  # of the files of an evaluation
_PLAIN_WIDTH = 120  # columns where stdout is no terminal


def console(plain_width: int = _PLAIN_WIDTH) -> Console:
    """A console on stdout, `plain_width` columns wide where stdout is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else plain_width)


def output_file(path: str | None, suffix: str) -> Path | None:
    """The file to write, or None.

    Raises UserError if the path does not end in `suffix`: companion files take its stem as their name.
    """
    if path is None:
        return None
    file = Path(path)
    if file.suffix != suffix:
        raise UserError(f"output_path={path}: does not end in {suffix}; end it in {suffix}")
    return file


def check_outputs(file: Path | None, **inputs: Iterable[str | Path | None]) -> None:
    """`check_output` for the file and its companion."""
    if file is not None:
        for suffix in _SUFFIXES:
            check_output(file.with_suffix(suffix), "output_path", **inputs)


def write_json(file: Path, values: dict[str, Any]) -> None:
    with translate_write_errors("output_path", file), atomic_file(file) as out:
        out.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_png(file: Path, figure: Figure) -> None:
    with translate_write_errors("output_path", file), atomic_binary_file(file) as out:
        figure.savefig(out, format="png", dpi=120)
