"""Source files of every format and encoding give the same records, and a fault costs one record."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallelmind.data.convert.csv_rows import csv_rows
from parallelmind.data.convert.readers import read_records, read_text
from parallelmind.data.convert.source_records import BadRecord
from parallelmind.errors import UserError

ROWS = [{"prompt": "capital?", "completion": "Zürich, “the” city"}, {"prompt": "a\tb", "completion": "c\nd"}]


def values(path: Path, encoding: str | None = None) -> list[Any]:
    records = list(read_records(str(path), encoding))
    assert [record for record in records if isinstance(record, BadRecord)] == []
    return [record.value for record in records]


def bad_ones(path: Path, encoding: str | None = None) -> list[str]:
    records = read_records(str(path), encoding)
    return [str(record).removeprefix(f"{path}:") for record in records if isinstance(record, BadRecord)]


def separated(delimiter: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


TEXT_FORMATS = {
    "json": json.dumps(ROWS, indent=1, ensure_ascii=False).encode(),
    "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),
    "csv": separated(","),
    "tsv": separated("\t"),
}
TEXT_FORMATS["ndjson"] = TEXT_FORMATS["jsonl"]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", TEXT_FORMATS)
def test_text_formats(tmp_path: Path, suffix: str, compression: str) -> None:
    path, content = tmp_path / f"a.{suffix}{compression}", TEXT_FORMATS[suffix]
    codec = {"": None, ".gz": "gzip", ".zst": "zstd"}[compression]
    path.write_bytes(pa.compress(content, codec, asbytes=True) if codec else content)
    assert values(path) == ROWS


def write_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path)


def write_arrow(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(("suffix", "write"), [("parquet", write_parquet), ("arrow", write_arrow)])
def test_row_formats(tmp_path: Path, suffix: str, write: Callable[[Path, pa.Table], None]) -> None:
    write(tmp_path / f"a.{suffix}", pa.Table.from_pylist(ROWS))
    assert values(tmp_path / f"a.{suffix}") == ROWS
    (tmp_path / f"a.{suffix}").write_bytes(b"something else")
    with pytest.raises(UserError, match=rf"data_path=.*a\.{suffix}: cannot be read .*; check that"):
        values(tmp_path / f"a.{suffix}")


MARKED = [("utf-16", None), ("utf-32", None), ("utf-8-sig", None), ("utf-16", "cp1252")]
UNMARKED = [("cp1252", "cp1252"), ("gb18030", "gb18030"), ("utf-16-le", "utf-16-le")]


@pytest.mark.parametrize(("encoding", "given"), MARKED + UNMARKED)
@pytest.mark.parametrize("suffix", TEXT_FORMATS)
def test_encodings(tmp_path: Path, suffix: str, encoding: str, given: str | None) -> None:
    """A byte order mark counts more than the setting."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(TEXT_FORMATS[suffix].decode().encode(encoding))
    assert values(path, given) == ROWS
    path = tmp_path / "a.txt"
    path.write_bytes("é\n\nü".encode(encoding))
    assert "".join(map(str, read_text(str(path), given))) == "é\n\nü"


@pytest.mark.parametrize(
    ("text", "encoding", "named"),
    [
        ("Zürich, déjà vu, “quoted” – it’s", "cp1252", "cp1252"),
        ("今天天气很好,我们去公园散步吧。", "gb18030", "gb18030"),
        ("今日は天気がいいから散歩しましょう。", "shift_jis", "cp932"),
        ("Сегодня хорошая погода, пойдём гулять.", "cp1251", "cp1251"),
        ("plain text", "utf-16-le", "utf-16-le"),
        ("plain text", "utf-16-be", "utf-16-be"),
    ],
)
def test_text_in_another_encoding_is_bad_and_the_encoding_named(
    tmp_path: Path, text: str, encoding: str, named: str
) -> None:
    hint = f"is not UTF-8; the file may be {named}: set encoding={named}"
    for suffix, content in {"txt": text, "jsonl": f'{{"text": "{text}"}}', "csv": f'"{text}"\n'}.items():
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(content.encode(encoding))
        told: list[object]
        try:
            told = list(read_text(str(path)) if suffix == "txt" else read_records(str(path)))
        except UserError as error:
            told = [error]
        assert hint in str(told[0])


def test_bytes_that_the_encoding_lacks_cost_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,\x81\n2,\xe9\n")
    assert bad_ones(tmp_path / "a.csv", "cp1252") == ["2: is not cp1252; set encoding to that of the file"]


@pytest.mark.parametrize(
    "content",
    [
        "Zürich, déjà vu, “quoted”".encode() + b" caf\xe9\n",  # UTF-8 with a damaged byte
        b"plain\n" + bytes(9) + b"\n",  # as a crash leaves a file
    ],
)
def test_damage_is_not_taken_for_an_encoding(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (bad,) = (str(line) for line in read_text(str(tmp_path / "a.txt")) if isinstance(line, BadRecord))
    assert bad.endswith("is not UTF-8")


@pytest.mark.parametrize(
    ("encoding", "reason"), [("utf-16", "does not start with BOM"), ("idna", "Unsupported error handling")]
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "json"])
def test_an_encoding_that_cannot_read_the_file_is_told(
    tmp_path: Path, suffix: str, encoding: str, reason: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(TEXT_FORMATS[suffix].decode().encode("utf-16-le"))
    with pytest.raises(UserError, match=rf"data_path=.*a\.{suffix}: cannot be read as .*{reason}"):
        values(path, encoding)


def test_joined_files_with_marks_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(2 * (b"\xef\xbb\xbf" + TEXT_FORMATS["jsonl"]))
    assert values(tmp_path / "a.jsonl") == 2 * ROWS


def test_a_key_that_stands_twice_is_told(tmp_path: Path) -> None:
    twice = '{"prompt": "a", "prompt": "b", "completion": "c"}'
    (tmp_path / "a.jsonl").write_text(f"{twice}\n")
    assert bad_ones(tmp_path / "a.jsonl") == ["1: has the key 'prompt' twice"]
    (tmp_path / "a.json").write_text(f"[{twice}]")
    with pytest.raises(UserError, match="is not JSON .*'prompt' twice"):
        values(tmp_path / "a.json")


UNCLOSED = "a quote that opens in this line does not close before a delimiter"
NOT_CSV = "is not CSV: ',' expected after '\"'; a quote inside quotes is written twice"


@pytest.mark.parametrize(
    ("lines", "good", "bad"),
    [
        (["good,one", '"not closed,hi', "next,ok", "last,x"], ["good", "next", "last"], [f"3: {UNCLOSED}"]),
        (["good,one", 'x,"never closed'], ["good"], [f"3: {UNCLOSED}"]),
        (['"never closed,hi', '"next, one",ok', "last,x"], ["next, one", "last"], [f"2: {UNCLOSED}"]),
        ([r'"say \"hi\"",hi', "next,ok"], ["next"], [f"2: {NOT_CSV}"]),
        (['"two', 'lines","open', "next,ok"], ["next"], [f"3: {UNCLOSED}"]),
        (['"two', 'lines",fine', "next,ok"], ["two\nlines", "next"], []),
        (['"two', 'lines"', "next,ok"], ["next"], ["2: has fewer columns than the header"]),
        ([f'"open {number},x' for number in range(2000)], [], [f"{n}: {UNCLOSED}" for n in range(2, 2002)]),
    ],
)
def test_a_quote_that_does_not_close_costs_one_row(
    tmp_path: Path, lines: list[str], good: list[str], bad: list[str]
) -> None:
    (tmp_path / "a.csv").write_text("\n".join(["a,b", *lines, ""]))
    records = list(read_records(str(tmp_path / "a.csv")))
    assert [record.value["a"] for record in records if not isinstance(record, BadRecord)] == good
    assert bad_ones(tmp_path / "a.csv") == bad


@pytest.mark.parametrize(
    ("header", "told"),
    [("a,b,a", "has the column 'a' twice"), ('"a,b', "a quote that opens"), ("\xff,b", "is not UTF-8")],
)
def test_a_bad_header_is_told(tmp_path: Path, header: str, told: str) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n1,2,3\n", encoding="latin-1")
    with pytest.raises(UserError, match=rf"data_path=.*a\.csv: its header {told}.*; correct the first line"):
        list(read_records(str(tmp_path / "a.csv")))


CELLS = st.text(st.sampled_from('ab",\n '), max_size=6)


@given(st.lists(st.lists(CELLS, min_size=2, max_size=3), max_size=8))
def test_what_the_csv_module_writes_is_read_as_it_was(rows: list[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    lines = enumerate(text.getvalue().splitlines(keepends=True), start=1)
    assert [row.cells for row in csv_rows(lines, ",")] == rows
