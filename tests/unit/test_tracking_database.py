"""An MLflow database in SQLite appears complete, and an incomplete one without runs is replaced."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from parallelmind.tracking_database import ensure_database, is_in_use

CONFIG = TrainConfig(data_path="data.jsonl")


def write(file: Path, *statements: str) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def build(file: Path) -> None:
    write(file, "CREATE TABLE experiments (name TEXT)", "INSERT INTO experiments VALUES ('Default')")


INCOMPLETE = {
    "zero bytes": (),
    "before the first migration": ("CREATE TABLE runs (id TEXT)",),
    "between migrations": (
        "CREATE TABLE alembic_version (version_num TEXT)",
        "INSERT INTO alembic_version VALUES ('0a8213491aaa')",
        "CREATE TABLE workspaces (name TEXT)",
        "INSERT INTO workspaces VALUES ('default')",
        "CREATE TABLE experiments (name TEXT)",
    ),
}


@pytest.mark.parametrize("statements", INCOMPLETE.values(), ids=INCOMPLETE)
def test_an_incomplete_database_without_rows_is_replaced(tmp_path: Path, statements: tuple[str, ...]) -> None:
    file = tmp_path / "mlflow.db"
    file.touch()
    write(file, *statements)
    assert not is_in_use(file)
    ensure_database(file, build)
    assert is_in_use(file)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_leftovers_of_a_killed_build_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    build(tmp_path / ".mlflow.db.part")
    (tmp_path / ".mlflow.db.part-journal").write_text("left")
    ensure_database(file, build)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mlflow.db.lock", "mlflow.db"]


def test_a_database_with_rows_and_a_file_of_another_kind_are_left_alone(tmp_path: Path) -> None:
    database, text, folder = tmp_path / "mlflow.db", tmp_path / "notes", tmp_path / "folder"
    write(database, "CREATE TABLE runs (id TEXT)", "INSERT INTO runs VALUES ('mine')")
    text.write_text("no database " * 100)
    folder.mkdir()
    before = database.read_bytes(), text.read_bytes()
    for file in (database, text, folder):
        ensure_database(file, build)
    assert (database.read_bytes(), text.read_bytes()) == before


def test_a_file_that_another_program_completes_meanwhile_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"

    def build_while_another_does(partial: Path) -> None:
        build(partial)
        write(file, "CREATE TABLE runs (id TEXT)", "INSERT INTO runs VALUES ('theirs')")

    ensure_database(file, build_while_another_does)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT id FROM runs").fetchall() == [("theirs",)]


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"no database " * 100, "restore a copy, remove it, or give another file"),
        (None, "restore a copy, remove it, or give another file"),
    ],
    ids=["another file", "interrupted upgrade with runs"],
)
def test_a_file_that_cannot_be_repaired_is_named(tmp_path: Path, content: bytes | None, remedy: str) -> None:
    from parallelmind.tracking import Tracker

    file = tmp_path / "mlflow.db"
    if content is None:
        write(
            file,
            "CREATE TABLE experiments (experiment_id INTEGER, name TEXT, lifecycle_stage TEXT)",
            "INSERT INTO experiments VALUES (1, 'mine', 'active')",
            "CREATE TABLE runs (run_uuid TEXT)",
        )
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} is damaged or no MLflow database: {remedy}") as caught:
        Tracker.start(f"sqlite:///{file}", "tests", "one", CONFIG, "key")
    assert "\n" not in str(caught.value)
