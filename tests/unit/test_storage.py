"""Files and folders are replaced as a whole, and are on disk before they take their name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import Timeout

from parallelmind.storage import (
    atomic_binary_file,
    atomic_dir,
    atomic_file,
    process_lock,
    remove_partial_dirs,
    sha256,
    try_lock_path,
)


class DiskEvents:
    """Records fsync and rename calls of real files, in order.

    An fsync is recorded as ("fsync", size) for a file and ("fsync", folder's path) for a folder; a rename as
    ("rename", target's path).
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int | Path]] = []
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._record_fsync)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._recording_rename(getattr(os, name)))

    def _record_fsync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.events.append(("fsync", path if path.is_dir() else path.stat().st_size))
        self._fsync(descriptor)

    def _recording_rename(self, rename):
        def record(source, target):
            rename(source, target)
            self.events.append(("rename", Path(target)))

        return record


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> DiskEvents:
    return DiskEvents(monkeypatch)


def test_atomic_file_is_on_disk_before_it_takes_its_name(tmp_path: Path, disk: DiskEvents) -> None:
    path = tmp_path / "file"
    with atomic_binary_file(path) as file:
        file.write(b"12345")
    assert disk.events == [("fsync", 5), ("rename", path), ("fsync", tmp_path)]
    disk.events.clear()
    with atomic_file(path) as text:
        text.write("é" * 1000)
    assert disk.events == [("fsync", 2000), ("rename", path), ("fsync", tmp_path)]
    disk.events.clear()
    with atomic_file(tmp_path / "file.gz") as text:
        text.write("é" * 1000)
    size = (tmp_path / "file.gz").stat().st_size
    assert disk.events == [("fsync", size), ("rename", tmp_path / "file.gz"), ("fsync", tmp_path)]


@pytest.mark.parametrize("replaces", [False, True])
def test_atomic_dir_is_on_disk_before_it_takes_its_name(
    tmp_path: Path, disk: DiskEvents, replaces: bool
) -> None:
    folder = tmp_path / "folder"
    if replaces:
        folder.mkdir()
    with atomic_dir(folder) as new:
        for number, name in enumerate(("a", "z", "sub/b", "sub/sub/c"), start=1):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(b"x" * number)
    named = disk.events.index(("rename", folder))
    flushed = [item for event, item in disk.events[:named] if event == "fsync"]
    assert {item for item in flushed if isinstance(item, int)} == {1, 2, 3, 4}
    assert [item.relative_to(new) for item in flushed if isinstance(item, Path)][-3:] == [
        Path("sub/sub"),
        Path("sub"),
        Path(),
    ]
    assert flushed.index(4) < flushed.index(new / "sub/sub"), "a folder follows its files"
    assert disk.events[named + 1 :] == [("fsync", tmp_path)]


def test_filled_folder_replaces_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    for name in ("first", "second"):
        with atomic_dir(folder) as new:
            (new / name).write_text(name)
    assert [path.name for path in folder.iterdir()] == ["second"]
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("exists", [True, False])
def test_the_target_of_a_link_is_replaced(tmp_path: Path, exists: bool) -> None:
    folder, file = tmp_path / "disk" / "folder", tmp_path / "disk" / "file"
    file.parent.mkdir()
    if exists:
        folder.mkdir()
        file.touch()
    for target in (folder, file):
        (tmp_path / target.name).symlink_to(target)
    with atomic_dir(tmp_path / "folder") as new:
        (new / "inner").touch()
    with atomic_file(tmp_path / "file") as text:
        text.write("new")
    assert (tmp_path / "folder").is_symlink()
    assert (tmp_path / "file").is_symlink()
    assert (folder / "inner").exists()
    assert file.read_text() == "new"


def test_old_folder_is_unchanged_after_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with atomic_dir(folder) as new:
        (new / "file").write_text("old")

    def fail_half_way() -> None:
        with atomic_dir(folder) as new:
            (new / "file").write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert (folder / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_old_folder_returns_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    (folder / "old").mkdir(parents=True)
    rename = os.rename

    def refuse_new(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise OSError("refused")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_new)
    with pytest.raises(OSError, match="refused"), atomic_dir(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["old"]


@pytest.mark.parametrize("open_file", [atomic_file, atomic_binary_file])
def test_old_file_is_unchanged_after_an_error(tmp_path: Path, open_file) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail_half_way() -> None:
        with open_file(path) as file:
            file.write("new" if open_file is atomic_file else b"new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_a_file_do_not_share_its_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_file(path) as first:
        with atomic_file(path) as second:
            first.write("first")
            second.write("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


def test_partial_folders_of_killed_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    writer = atomic_dir(tmp_path / "folder")
    (writer.__enter__() / "file").touch()
    remove_partial_dirs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]


def test_equal_text_gives_equal_compressed_bytes(tmp_path: Path) -> None:
    for name in ("a.gz", "b.gz"):
        with atomic_file(tmp_path / name) as file:
            file.write("line\n")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_process_lock_has_one_holder_and_creates_its_folder(tmp_path: Path) -> None:
    lock_file = tmp_path / "new" / ".lock"
    with process_lock(lock_file), pytest.raises(Timeout), process_lock(lock_file, timeout=0):
        pass
    with process_lock(lock_file, timeout=0):
        pass


@pytest.mark.parametrize("name", ["file", "folder"])
def test_a_locked_path_is_refused_and_keeps_its_content(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    with try_lock_path(tmp_path / name) as locked, try_lock_path(tmp_path / name) as locked_twice:
        assert (locked, locked_twice) == (True, False)
    with try_lock_path(tmp_path / name) as locked:
        assert locked
    assert (tmp_path / "file").read_text() == "text"
    assert len(list(tmp_path.iterdir())) == 2


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        with atomic_dir(tmp_path / "folder") as new:
            (new / "nested").mkdir()
            for path in (new / "file", new / "nested" / "file"):
                path.touch()
                path.chmod(0o600)  # as safetensors does
        with atomic_binary_file(tmp_path / "file") as file:
            file.write(b"1")
    finally:
        os.umask(before)
    for name in ("folder/file", "folder/nested/file", "file"):
        assert (tmp_path / name).stat().st_mode & 0o777 == mode
