"""Access to an output that may exist already: an exclusive lock, and its last complete row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def find_last_row(output: Path) -> tuple[int, int, int]:
    """The number of complete rows, the input line number of the last one, and the offset of its end.

    All are 0 if there is none. Raises UserError if the last row has no line number.
    """
    rows, end, last_row = 0, 0, b""
    with open(output, "rb") as file:
        for raw in file:
            if raw.endswith(b"\n"):
                rows, end, last_row = rows + 1, end + len(raw), raw
    try:
        return rows, int(json.loads(last_row)["line"]) if rows else 0, end
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"output_path={output}: row {rows} has no line number of data_path; remove that row, and resume"
        ) from error
