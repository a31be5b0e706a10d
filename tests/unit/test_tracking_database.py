"""An MLflow database in SQLite appears complete, and an incomplete one without runs is replaced."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote

import pytest
from permissions import obeying_permissions
from sqlalchemy import make_url

from parallelmind.config import TrainConfig
from parallelmind.errors import UserError
from parallelmind.tracking_database import ensure_database, is_in_use

CONFIG = TrainConfig(data_path="data.jsonl")


def write(file: Path, *statements: str) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def build(file: Path) -> None:
    write(
        file,
        "CREATE TABLE experiments (name TEXT)",
        "INSERT INTO experiments VALUES ('Default')",
        *(f"CREATE TABLE {name} (name TEXT)" for name in ("alembic_version", "runs", "workspaces")),
    )


INCOMPLETE = {
    "zero bytes": (),
    "before the first migration": ("CREATE TABLE runs (id TEXT)",),
    "between migrations": (
        "CREATE TABLE alembic_version (version_num TEXT)",
        "INSERT INTO alembic_version VALUES ('0a8213491aaa')",
        "CREATE TABLE workspaces (name TEXT)",
        "INSERT INTO workspaces VALUES ('default')",
        "CREATE TABLE experiments (name TEXT)",
        "CREATE TABLE _alembic_tmp_runs (name TEXT)",
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
    database, text, other = tmp_path / "mlflow.db", tmp_path / "notes", tmp_path / "other.db"
    write(database, "CREATE TABLE runs (id TEXT)", "INSERT INTO runs VALUES ('mine')")
    text.write_text("no database " * 100)
    write(other, "CREATE TABLE studies (id TEXT)")
    before = [file.read_bytes() for file in (database, text, other)]
    for file in (database, text, other):
        ensure_database(file, build)
    assert [file.read_bytes() for file in (database, text, other)] == before
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("target", ["missing", "empty"])
def test_the_target_of_a_link_is_created(tmp_path: Path, target: str) -> None:
    link, file = tmp_path / "link.db", tmp_path / "disk" / "mlflow.db"
    file.parent.mkdir()
    if target == "empty":
        file.touch()
    link.symlink_to(file)
    ensure_database(link, build)
    assert link.is_symlink()
    assert is_in_use(file)


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


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from parallelmind.tracking import Tracker

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    Tracker.start(f"sqlite:///{file}", "tests", "one", CONFIG, "key")
    return file


def set_schema(version: str) -> Callable[[Path], object]:
    return lambda file: write(file, f"UPDATE alembic_version SET version_num = '{version}'")


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_schema("ffffffffffff"), "a later MLflow wrote it: use that version"),
        (set_schema("0a8213491aaa"), "an earlier MLflow wrote it: copy .*, then run `mlflow db upgrade"),
        (make_folder, "Is a directory"),
        (lambda file: file.chmod(0), "Permission denied"),
    ],
)
def test_a_database_that_cannot_be_used_is_told_at_once_with_its_remedy(
    database: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    from parallelmind.tracking import Tracker

    file = Path(shutil.copy(database, tmp_path))
    change(file)
    start = time.monotonic()
    with obeying_permissions(), pytest.raises(UserError, match=f"mlflow_uri=.*{message}") as caught:
        Tracker.start(f"sqlite:///{file}", "tests", "one", CONFIG, "key")
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_database_that_another_program_locks_is_told(database: Path, tmp_path: Path) -> None:
    from parallelmind.tracking import Tracker

    file = Path(shutil.copy(database, tmp_path))
    uri = f"sqlite:///{file}?timeout=0"
    with closing(sqlite3.connect(file, isolation_level="EXCLUSIVE")) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match="database is locked.*; another program writes to .*: end it"):
            Tracker.start(uri, "tests", "one", CONFIG, "key")


@pytest.mark.parametrize("name", ["a b#c.db", "50%25.db", "o'b é.db", "a%3Fb.db"])
def test_a_database_may_have_any_name(tmp_path: Path, name: str) -> None:
    from parallelmind.tracking import absolute_uri, sqlite_file

    uri = f"sqlite:///{tmp_path}/{name}"
    assert sqlite_file(absolute_uri(uri)) == tmp_path / unquote(name)
    assert make_url(absolute_uri(uri)).database == make_url(uri).database == str(tmp_path / unquote(name))
