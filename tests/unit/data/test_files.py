"""The files of a data path, and the parts that cover them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from parallelmind.data import files as files_module
from parallelmind.data.files import file_parts, find_files, open_file
from parallelmind.errors import UserError, UserNotice


def names(path: str) -> list[str]:
    return [Path(file).name for file in find_files(path)]


def test_a_path_is_a_file_a_folder_a_glob_or_several(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_path=.*no such file; .* files that end in \.jsonl"):
        find_files(str(tmp_path))
    all_names = ["a.jsonl", "b.jsonl", "c.JSONL.gz", "d.ndjson.zst", "e.parquet", "f.arrow"]
    for name in reversed(all_names):
        (tmp_path / name).touch()
    assert names(str(tmp_path)) == all_names
    for name in all_names[2:]:
        (tmp_path / name).unlink()
    (tmp_path / "notes.txt").touch()
    assert names(f"{tmp_path}/[ab].jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(f"{tmp_path}/notes.txt") == ["notes.txt"]
    assert names(f"{tmp_path}/b.jsonl, {tmp_path}/*.jsonl") == ["b.jsonl", "a.jsonl"]


@pytest.mark.parametrize("path", ["nowhere", "no*where", "memory://nowhere", " , "])
def test_path_without_files_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"validation_path=.*(no such file|names no file)"):
        find_files(path, "validation_path")


EXISTING = [
    "a,b.jsonl",
    "a[1].jsonl",
    "a*.jsonl",
    "~a.jsonl",
    "a b.jsonl",
    " a.jsonl",
    "a::b.jsonl",
    "a?.jsonl",
    "a,b",
]


@pytest.mark.parametrize("name", [*EXISTING, "a,b"])
def test_an_existing_path_is_taken_as_it_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file, in a list, as a folder, and as a folder before a glob; through a link as well."""
    monkeypatch.chdir(tmp_path)
    for file in (name, "a1.jsonl", "b.jsonl", "ab.jsonl", "x.jsonl"):
        (tmp_path / file).write_text('{"text": "x"}\n')
    (tmp_path / "link.jsonl").symlink_to(name)
    assert names(name) == [name]
    assert names(f"x.jsonl,{name}, b.jsonl") == ["x.jsonl", name, "b.jsonl"]
    assert names("link.jsonl") == ["link.jsonl"]
    assert [part.end for part in file_parts(find_files(name))] == [14]
    folder = tmp_path / "in" / name
    folder.mkdir(parents=True)
    (folder / "c.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "in" / "link").symlink_to(folder)
    (folder / "d.jsonl").symlink_to(folder / "c.jsonl")
    for path in (f"in/{name}", "in/link", f"in/{name}/*.jsonl", str(folder)):
        assert names(path) == ["c.jsonl", "d.jsonl"]


def test_a_url_may_have_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe("/commas/a,b.jsonl", b"x")
    fsspec.filesystem("memory").pipe("/commas/c.jsonl", b"x")
    assert names("memory://commas/a,b.jsonl,memory://commas/c.jsonl") == ["a,b.jsonl", "c.jsonl"]


def test_what_a_folder_holds_beside_its_data_is_told(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv", "c.json", "d.md", "e.txt", "f.jsonl.part", "g.parquet.gz"):
        (tmp_path / name).touch()
    (tmp_path / "h.jsonl").mkdir()
    (tmp_path / "i.jsonl").symlink_to("nowhere")
    told = r"data_path=.*: reads 1 files of this folder and skips 8: b\.csv, c\.json, d\.md, e\.txt, .*, …"
    with pytest.warns(UserNotice, match=told):
        assert names(str(tmp_path)) == ["a.jsonl"]
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"no such file among b\.csv, c\.json"):
        find_files(str(tmp_path))


@pytest.mark.parametrize(("path", "near"), [("trian.jsonl", "train.jsonl"), ("dta/train.jsonl", "data")])
def test_a_missing_path_names_what_is_similar(path: str, near: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match=rf"no such file \(did you mean {tmp_path}/{near}\?\); give"):
        find_files(str(tmp_path / path))


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
