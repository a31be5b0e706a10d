"""The SQLite file of an MLflow store: it appears under its name when it is complete."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path

from parallelmind.storage import process_lock

_FILLED_BY_MIGRATIONS = {"alembic_version", "workspaces"}
_COPY_OF_MIGRATION = "_alembic_tmp_"


def ensure_database(file: Path, build: Callable[[Path], None]) -> None:
    """Create the database unless `file` is in use. Raises OSError if `file` cannot be opened.

    build: creates the database at a path beside `file` and closes it. The database then gets its name by one
    rename, under a lock, so neither a kill nor a second process leaves an incomplete file. A file without any
    run, which another process left incomplete, is replaced, unless it changes in the meantime or holds tables
    of something else. The target of a symbolic link is created or replaced.
    """
    file = file.resolve()
    if file.exists():
        file.open("rb").close()  # MLflow would try to open it for minutes
    if is_in_use(file):
        return
    with process_lock(file.with_name(f".{file.name}.lock")):
        is_complete = False
        while not is_complete and not is_in_use(file):
            is_complete = _build_and_rename(file, build)


def _build_and_rename(file: Path, build: Callable[[Path], None]) -> bool:
    """Returns False if `file` has changed in the meantime."""
    seen = _last_change(file)
    partial = file.with_name(f".{file.name}.part")
    for leftover in (partial, partial.with_name(f"{partial.name}-journal")):
        leftover.unlink(missing_ok=True)
    build(partial)
    if _last_change(file) != seen:
        return False
    if file.exists() and not _tables(file) <= _tables(partial):
        partial.unlink()
    else:
        os.replace(partial, file)
    return True


def is_in_use(file: Path) -> bool:
    """Whether the file is a database with rows of its own, or anything but a database.

    MLflow adds the default experiment when all tables exist: an MLflow database without rows is incomplete.
    """
    if not file.is_file():
        return file.exists()
    try:
        tables = _tables(file) - _FILLED_BY_MIGRATIONS
        with _open(file) as connection:
            return any(connection.execute(f'SELECT 1 FROM "{name}" LIMIT 1').fetchone() for name in tables)
    except sqlite3.Error:  # MLflow reports it when it opens the file
        return True


def _tables(file: Path) -> set[str]:
    with _open(file) as connection:
        names = {
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        }
    return {name for name in names if not name.startswith(_COPY_OF_MIGRATION)}


def _open(file: Path) -> AbstractContextManager[sqlite3.Connection]:
    return closing(sqlite3.connect(f"{file.as_uri()}?mode=rw", uri=True))


def _last_change(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None
