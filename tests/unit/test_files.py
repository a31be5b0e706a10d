"""Byte ranges: every line in exactly one, wherever the cuts fall."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallelmind.data.files import ByteRange, byte_ranges, find_files
from parallelmind.errors import UserError


@given(content=st.lists(st.sampled_from([b"a", b"\n", b"\r", "\u2028".encode(), b"\xff"]), max_size=40), size=st.integers(1, 12))
def test_every_line_is_read_once(tmp_path_factory: pytest.TempPathFactory, content: list[bytes], size: int) -> None:
    file = tmp_path_factory.mktemp("ranges") / "data"
    data = b"".join(content)
    file.write_bytes(data)
    ranges = [ByteRange(str(file), at, min(at + size, len(data))) for at in range(0, len(data), size)]
    expected = data.removesuffix(b"\n").split(b"\n") if data else []
    assert [line for place in ranges for line in place.lines()] == expected


def test_ranges_cover_the_files_and_give_every_worker_several(tmp_path: Path) -> None:
    sizes = {"one": 100_000, "two": 30, "empty": 0}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    files = [str(tmp_path / name) for name in sizes]
    ranges = byte_ranges(files, workers=2)
    assert sum(place.end - place.start for place in ranges) == sum(sizes.values())
    assert len(ranges) >= 16


def test_a_folder_means_its_jsonl_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_path=.*holds no \*\.jsonl"):
        find_files(str(tmp_path))
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    assert [Path(file).name for file in find_files(str(tmp_path))] == ["a.jsonl", "b.jsonl"]
    with pytest.raises(UserError, match="validation_path=nowhere: no such file"):
        find_files("nowhere", "validation_path")
