"""Every line of plain, compressed and Parquet files is read once, whatever its neighbours hold."""

from __future__ import annotations

import gzip
import io
import json
import random
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallelmind.data import files
from parallelmind.data import lines as lines_module
from parallelmind.data.files import FilePart, file_parts
from parallelmind.data.lines import Line, read_lines
from parallelmind.errors import UserError

PIECES = [b"a", b"bb", b"\n", b"\r", "\u2028".encode(), "\u0085".encode(), b"\xff", b"\x00"]


def all_lines(file: Path) -> list[Line]:
    return [line for part in file_parts([str(file)]) for line in read_lines(part)]


@given(
    content=st.lists(st.sampled_from(PIECES), max_size=40),
    size=st.integers(1, 12),
    longest=st.integers(3, 50),
)
def test_every_line_is_read_once_wherever_parts_begin(tmp_path_factory, content, size, longest):
    file = tmp_path_factory.mktemp("lines") / "data"
    data = b"".join(content)
    file.write_bytes(data)
    expected, offset = [], 0
    for raw in data.removesuffix(b"\n").split(b"\n") if data else []:
        expected.append((offset, raw))
        offset += len(raw) + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines_module, "MAX_LINE_BYTES", longest)
        parts = [FilePart(str(file), at, min(at + size, len(data))) for at in range(0, len(data), size)]
        lines = [line for part in parts for line in read_lines(part)]
    assert [line.offset for line in lines] == [offset for offset, _ in expected]
    for line, (_, raw) in zip(lines, expected, strict=True):
        if line.problem is None:
            assert line.raw == raw
        else:
            assert len(raw) + 1 > longest
            assert "the limit for a line is" in line.problem


def test_very_long_line_is_skipped_once_without_being_held(tmp_path, monkeypatch):
    """Parts inside the line do not read beyond their own end."""
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"text": "a"}\n' + b"x" * (20 << 20) + b'\n{"text": "b"}\n')
    monkeypatch.setattr(lines_module, "MAX_LINE_BYTES", 1000)
    read = []

    class Counting:
        def __init__(self, stream):
            self.stream = stream

        def readline(self, limit):
            read.append(self.stream.readline(limit))
            assert len(read[-1]) <= 1 << 20
            return read[-1]

        def __getattr__(self, name):
            return getattr(self.stream, name)

    monkeypatch.setattr(lines_module, "open_file", lambda name: nullcontext(Counting(open(name, "rb"))))  # noqa: SIM115
    first, long, last = all_lines(file)
    assert (first.raw, last.raw) == (b'{"text": "a"}', b'{"text": "b"}')
    assert "20,971,521 bytes" in long.problem
    assert sum(map(len, read)) < 3 * file.stat().st_size


TEXT = b"".join(b'{"text": "%d"}\n' % number for number in range(2000))


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_files(tmp_path, ending):
    file = tmp_path / f"data.jsonl.{ending}"
    with pa.output_stream(str(file), compression={"gz": "gzip", "zst": "zstd"}[ending]) as stream:
        stream.write(TEXT)
    assert [line.raw for line in all_lines(file)] == TEXT.splitlines()
    assert all_lines(file)[7].offset == TEXT.index(b'{"text": "7"}')


def test_damaged_gzip_file_yields_the_lines_before_the_damage(tmp_path):
    whole = gzip.compress(TEXT)
    for damaged in (whole[: len(whole) // 2], whole[: len(whole) // 2] + b"\x00" * 50, whole + b"garbage"):
        file = tmp_path / "data.jsonl.gz"
        file.write_bytes(damaged)
        *good, last = all_lines(file)
        assert "damaged from here on" in last.problem
        assert good
        assert [line.raw for line in good] == TEXT.splitlines()[: len(good)]
        assert last.offset <= len(TEXT)


class Unreliable(io.BytesIO):
    """A file whose second half cannot be read in a sequence, as a lost connection does; its end can."""

    def readinto(self, buffer):
        if len(self.getvalue()) / 2 <= self.tell() < len(self.getvalue()) * 0.9:
            raise TimeoutError
        return super().readinto(buffer)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow"])
def test_a_file_that_cannot_be_read_is_not_a_damaged_one(tmp_path, monkeypatch, ending):
    """Training leaves out damage: it would go on without the rest of the file."""
    file = tmp_path / f"data.{ending}"
    table = pa.table({"text": [random.Random(number).randbytes(30).hex() for number in range(20_000)]})
    if ending == "parquet":
        pq.write_table(table, file, use_dictionary=False, row_group_size=2000)
    elif ending == "arrow":
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
    else:
        compression = {"jsonl": None, "jsonl.gz": "gzip", "jsonl.zst": "zstd"}[ending]
        with pa.output_stream(str(file), compression=compression) as stream:
            stream.writelines(json.dumps(row).encode() + b"\n" for row in table.to_pylist())
    parts = file_parts([str(file)])
    content = file.read_bytes()
    monkeypatch.setattr(files, "_open_raw", lambda file: Unreliable(content))
    with pytest.raises(UserError, match=rf"^data_path={file}: cannot be read \(TimeoutError\); check"):
        list(chain.from_iterable(map(read_lines, parts)))


def test_rows_of_parquet(tmp_path):
    rows = [
        {"main": "m", "branches": [{"prompt": "p", "completion": "c", "text": None}], "text": None},
        {"main": None, "branches": None, "text": "standalone"},
    ]
    file = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(rows * 3), file, row_group_size=2)
    lines = all_lines(file)
    assert [line.offset for line in lines] == list(range(6))
    assert lines[2].value == {"main": "m", "branches": [{"prompt": "p", "completion": "c"}]}
    assert lines[5].value == {"text": "standalone"}


def test_damaged_row_group_costs_no_other(tmp_path):
    file = tmp_path / "data.parquet"
    pq.write_table(
        pa.table({"text": [f"{number} lives" for number in range(3000)]}), file, row_group_size=1000
    )
    column = pq.ParquetFile(file).metadata.row_group(1).column(0)
    content = bytearray(file.read_bytes())
    first, size = column.dictionary_page_offset, column.total_compressed_size
    content[first : first + size] = b"\xff" * size
    file.write_bytes(content)
    lines = all_lines(file)
    (bad,) = [line for line in lines if line.problem]
    assert bad.offset == 1000
    assert "damaged from here on" in bad.problem
    assert [line.value["text"] for line in lines if not line.problem] == [
        f"{number} lives" for number in (*range(1000), *range(2000, 3000))
    ]


def test_parquet_text_that_is_not_utf8_is_reported(tmp_path):
    file = tmp_path / "data.parquet"
    column = pa.array([b"good", b"\xff\xfe"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": column}), file, row_group_size=1)
    good, bad = all_lines(file)
    assert good.value == {"text": "good"}
    assert "utf-8" in bad.problem


@pytest.mark.parametrize("new_writer", [pa.ipc.new_file, pa.ipc.new_stream])
def test_rows_of_arrow(tmp_path, new_writer):
    """`datasets` caches streams; other programs write files."""
    rows = [{"text": str(number), "main": None, "n": 1} for number in range(2500)]
    table = pa.Table.from_pylist(rows)
    with new_writer(tmp_path / "data.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2000)
    lines = all_lines(tmp_path / "data.arrow")
    assert [line.offset for line in lines] == list(range(2500))
    assert [line.value for line in lines] == [{"text": row["text"], "n": 1} for row in rows]
    content = (tmp_path / "data.arrow").read_bytes()
    if new_writer is pa.ipc.new_stream:
        (tmp_path / "data.arrow").write_bytes(content[: len(content) - 2000])
        *good, bad = all_lines(tmp_path / "data.arrow")
        assert len(good) == 2000
        assert "damaged from here on" in bad.problem


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le"])
def test_a_file_in_utf_16_or_utf_32_is_named_so(tmp_path, encoding):
    mark = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
    (tmp_path / "data.jsonl").write_bytes((mark + '{"text": "a"}\n').encode(encoding))
    name = encoding.removesuffix("-le")
    assert all_lines(tmp_path / "data.jsonl")[0].problem == (
        f"the file is {name}; convert it as `iconv -f {name} -t utf-8` does"
    )


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_row_without_a_python_value_costs_no_other(tmp_path, suffix):
    days = pa.array([0, 1 << 30, 1], pa.date32())  # the second is 2.9 million years away
    table, file = pa.table({"text": ["a", "b", "c"], "day": days}), tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    lines = all_lines(file)
    assert [line.offset for line in lines] == [0, 1, 2]
    assert [line.value and line.value["text"] for line in lines] == ["a", None, "c"]
    assert lines[1].problem.startswith("the row cannot be read (")
