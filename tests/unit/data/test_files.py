"""The files of a data path, and the parts that cover them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from parallelmind.data import files as files_module
from parallelmind.data.files import file_parts, find_files, open_file
from parallelmind.errors import UserError


def names(path: str) -> list[str]:
    return [Path(file).name for file in find_files(path)]


def test_a_path_is_a_file_a_folder_a_glob_or_several(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_path=.*no such file.*\*\.jsonl"):
        find_files(str(tmp_path))
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.parquet", "notes.txt"):
        (tmp_path / name).touch()
    all_names = ["a.jsonl", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.parquet"]
    assert names(str(tmp_path)) == all_names
    assert names(f"{tmp_path}/[ab].jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(f"{tmp_path}/notes.txt") == ["notes.txt"]
    assert names(f"{tmp_path}/b.jsonl, {tmp_path}/*.jsonl") == ["b.jsonl", "a.jsonl"]


@pytest.mark.parametrize("path", ["nowhere", "no*where", "memory://nowhere", " , "])
def test_path_without_files_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"validation_path=.*(no such file|names no file)"):
        find_files(path, "validation_path")


def test_unreachable_path_is_reported_in_one_line() -> None:
    with pytest.raises(UserError, match="data_path=nosuch://bucket/a.jsonl: cannot be reached"):
        find_files("nosuch://bucket/a.jsonl")


def test_urls_of_any_filesystem_are_read() -> None:
    system = fsspec.filesystem("memory")
    for name in ("one", "two"):
        system.pipe(f"/data/{name}.jsonl", b'{"text": "x"}\n')
    files = find_files("memory://data")
    assert files == ["memory:///data/one.jsonl", "memory:///data/two.jsonl"]
    with open_file(files[0]) as stream:
        assert stream.read() == b'{"text": "x"}\n'
    assert [part.end for part in file_parts(files)] == [14, 14]


def test_parts_cover_the_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_MIN_PART_BYTES", 1000)
    monkeypatch.setattr(files_module, "_MAX_PART_BYTES", 1000)
    for name, size in {"one.jsonl": 2500, "two.jsonl": 30, "empty.jsonl": 0, "whole.jsonl.gz": 5000}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    paths = [str(tmp_path / name) for name in ("one.jsonl", "empty.jsonl", "two.jsonl", "whole.jsonl.gz")]
    parts = [(Path(part.file).name, part.start, part.end) for part in file_parts(paths)]
    one = [("one.jsonl", 0, 1000), ("one.jsonl", 1000, 2000), ("one.jsonl", 2000, 2500)]
    assert parts == [*one, ("two.jsonl", 0, 30), ("whole.jsonl.gz", 0, 5000)]


@pytest.mark.parametrize(
    ("size", "lengths"), [(900, [900]), (3000, [1000] * 3), (6000, [1500] * 4), (9000, [2000] * 4 + [1000])]
)
def test_large_data_is_cut_into_larger_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, lengths: list[int]
) -> None:
    monkeypatch.setattr(files_module, "_MIN_PART_BYTES", 1000)
    monkeypatch.setattr(files_module, "_MAX_PART_BYTES", 2000)
    monkeypatch.setattr(files_module, "_TARGET_PARTS", 4)
    (tmp_path / "a.jsonl").write_bytes(b"x" * size)
    assert [part.end - part.start for part in file_parts([str(tmp_path / "a.jsonl")])] == lengths


@pytest.mark.parametrize(
    "content", [b"", b'{"text": "JSON under another name"}', b"PAR1" + bytes(50) + b"PAR1"]
)
def test_file_that_is_not_parquet_is_reported_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"^validation_path=.*/a\.parquet: cannot be read \(.*\); check that it is a Parquet file",
    ) as caught:
        file_parts([str(tmp_path / "a.parquet")], "validation_path")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("use", [lambda file: file_parts([file]), open_file])
def test_file_removed_after_it_was_found_is_reported_in_one_line(
    tmp_path: Path, use: Callable[[str], object]
) -> None:
    with pytest.raises(
        UserError,
        match=r"^data_path=.*/a\.jsonl: was found before .* \(No such file or directory\); restore it$",
    ):
        use(str(tmp_path / "a.jsonl"))
