"""The SQLite file of an MLflow store: it appears under its name when it is complete."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from parallelmind.storage import process_lock

_FILLED_BY_MIGRATIONS = ("alembic_version", "workspaces")


def ensure_database(file: Path, build: Callable[[Path], None]) -> None:
    """Create the database unless `file` is in use.

    build: creates the database at a path beside `file` and closes it. The database then gets its name by one
    rename, under a lock, so neither a kill nor a second process leaves an incomplete file. A file without any
    run, which another program left incomplete, is replaced, unless it changes in the meantime.
    """
    if is_in_use(file):
        return
    partial = file.with_name(f".{file.name}.part")
    with process_lock(file.with_name(f".{file.name}.lock")):
        while not is_in_use(file):
            seen = _last_change(file)
            for leftover in (partial, partial.with_name(f"{partial.name}-journal")):
                leftover.unlink(missing_ok=True)
            build(partial)
            if _last_change(file) == seen:
                os.replace(partial, file)


def is_in_use(file: Path) -> bool:
    """Whether the file is a database with rows of its own, or anything but a database.

    MLflow adds the default experiment when all tables exist: an MLflow database without rows is incomplete.
    """
    if not file.is_file():
        return file.exists()
    try:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True)) as connection:
            names = [
                name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            ]
            return any(
                connection.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone()
                for name in names
                if name not in _FILLED_BY_MIGRATIONS
            )
    except sqlite3.Error:  # MLflow reports it when it opens the file
        return True


def _last_change(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None
