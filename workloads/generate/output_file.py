"""Access to an output that may exist already: an exclusive lock, and recovery of its last complete row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from parallelmind.errors import UserError
from parallelmind.storage import try_lock_path


@contextmanager
def exclusive_lock(output: Path) -> Iterator[None]:
    """Hold the lock on an existing output file or folder. Raises UserError if another process holds it."""
    with try_lock_path(output) as locked:
        if not locked:
            raise UserError(
                f"output_path={output}: another process is writing it; wait for it, or choose another name"
            )
        yield


def drop_partial_row(file: BinaryIO, output: Path) -> tuple[int, int]:
    """Truncate the file after its last complete row and move to its end.

    Returns the number of rows and the input line number of the last one (0 if there is none). Raises
    UserError if the last row has no line number.
    """
    rows, end, last_row = 0, 0, b""
    file.seek(0)
    for raw in file:
        if not raw.endswith(b"\n"):
            break
        rows, end, last_row = rows + 1, end + len(raw), raw
    file.truncate(end)
    file.seek(end)
    try:
        return rows, int(json.loads(last_row)["line"]) if rows else 0
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"output_path={output}: row {rows} has no line number of data_path; remove that row, and resume"
        ) from error
