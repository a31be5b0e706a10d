"""Tokenised data travels in tables of a limited size, whatever the size of a file part."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from parallelmind.config import DataConfig, ModelConfig
from parallelmind.data import pipeline
from parallelmind.data.files import file_parts


@pytest.mark.parametrize(("records", "rows"), [(10, [4, 4, 2]), (4, [4]), (0, [])])
def test_a_part_becomes_tables_of_a_limited_number_of_records(
    tmp_path: Path, base: ModelConfig, monkeypatch: pytest.MonkeyPatch, records: int, rows: list[int]
) -> None:
    monkeypatch.setattr(pipeline, "_RECORDS_PER_TABLE", 4)
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "who"}\n' * records + b"damaged\n"))
    (part,) = file_parts([str(path)])
    tables = pipeline._tokenise_to_tables(part, DataConfig(data_path=str(path)), base)
    assert [table.num_rows for table in tables] == rows
