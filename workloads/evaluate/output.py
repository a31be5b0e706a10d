"""What the evaluations write and where they print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from parallelmind.errors import UserError, translate_write_errors
from parallelmind.storage import atomic_binary_file, atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLAIN_WIDTH = 120  # where the output is no terminal


def console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_WIDTH)


def output_file(path: str | None, ending: str) -> Path | None:
    """The file to write, if any. Raises UserError for another ending: what lies beside it takes its name from
    it.
    """
    if path is None:
        return None
    file = Path(path).expanduser()
    if file.suffix != ending:
        raise UserError(f"output_path={path}: is not named as what it will be; end it in {ending}")
    return file


def write_json(file: Path, values: dict[str, Any]) -> None:
    with translate_write_errors("output_path", file), atomic_file(file) as out:
        out.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_png(file: Path, figure: Figure) -> None:
    with translate_write_errors("output_path", file), atomic_binary_file(file) as out:
        figure.savefig(out, format="png", dpi=120)
