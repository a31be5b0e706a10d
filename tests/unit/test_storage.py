"""A folder is replaced whole, or stays as it was."""

from pathlib import Path

import pytest

from parallelmind.storage import atomic_dir, sha256


def test_a_filled_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    for name in ("first", "second"):
        with atomic_dir(folder) as built:
            (built / name).write_text(name)
    assert [path.name for path in folder.iterdir()] == ["second"]
    assert list(folder.parent.iterdir()) == [folder]


def test_after_an_error_the_old_folder_is_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with atomic_dir(folder) as built:
        (built / "file").write_text("old")

    def fail_half_way() -> None:
        with atomic_dir(folder) as built:
            (built / "file").write_text("new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert (folder / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
