"""The estimates of an epoch are its real counts, whatever the format, the language and the limits."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_tokenizer

from parallelmind.config import DataConfig
from parallelmind.data import survey as survey_module
from parallelmind.data.epoch_estimate import EpochEstimate, estimate_epoch
from parallelmind.data.files import file_parts
from parallelmind.data.packing import EpochSeed, sample_batches
from parallelmind.data.pipeline import survey_files
from parallelmind.data.tokenise import tokenise_part

ENGLISH = "The answer to the question is in the passage. "
CHINESE = "问题的答案就在这段文字里,请仔细阅读。"


def texts(text: str, count: int) -> list[dict[str, Any]]:
    """Records of very different lengths, the long ones last, so a sample from the beginning is biased."""
    draws = random.Random(0)
    return [
        {"text": f"{number} {text * draws.randint(1, 3 + number * 6 // count)}"} for number in range(count)
    ]


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        columns = {key: [record.get(key) for record in records] for key in {**records[0], **records[-1]}}
        pq.write_table(pa.table(columns), path, row_group_size=100)
    else:
        path.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8"
        )
    return path


def config(path: Path, **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"data_path": str(path), "length_window": 4, **settings})


def estimate(path: Path, data: DataConfig) -> int:
    return epoch(path, data).batches


def epoch(path: Path, data: DataConfig) -> EpochEstimate:
    return estimate_epoch(survey_files([str(path)], data), tiny_tokenizer(), data, seed=3)


def count(path: Path, data: DataConfig) -> int:
    """The batches of the first epoch, counted."""
    tokenised = (
        item for part in file_parts([str(path)]) for item in tokenise_part(part, tiny_tokenizer(), data)
    )
    records = (record for item in tokenised for record in item.for_packing())
    return sum(1 for _ in sample_batches(records, data, EpochSeed(3)))


MODES: list[dict[str, Any]] = [
    {"batch_tokens": 4096},
    {"batch_size": 3, "max_sample_tokens": 400},  # ends groups before they reach their size
    {"batch_size": 10, "batch_by_samples": False, "max_branch_tokens": 60, "overlong": "skip"},
]


@pytest.mark.parametrize("settings", MODES)
def test_small_epoch_is_counted_exactly_and_equal_in_both_formats(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    records = [*texts(CHINESE, 150), {"main": ENGLISH * 3, "branches": [ENGLISH] * 20}]
    paths = [write(tmp_path / name, records) for name in ("data.jsonl", "data.parquet")]
    estimates = [estimate(path, config(path, **settings)) for path in paths]
    assert estimates == [count(path, config(path, **settings)) for path in paths]
    assert estimates[0] == estimates[1] > 5


@pytest.mark.parametrize("settings", MODES)
def test_an_epoch_of_trees_is_counted_exactly(tmp_path: Path, settings: dict[str, Any]) -> None:
    fork = {"text": ENGLISH, "branches": [ENGLISH, ENGLISH * 2], "reduce": {"text": "who", "targets": []}}
    trees = [{"main": "who", "branches": [fork] * (1 + i % 6), "reduce": ENGLISH} for i in range(60)]
    path = write(tmp_path / "data.jsonl", [*trees, *texts(ENGLISH, 20)])
    data = config(path, **settings)
    assert estimate(path, data) == count(path, data) > 3


@pytest.mark.parametrize("settings", MODES)
@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_large_epoch_is_estimated_from_a_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str, settings: dict[str, Any]
) -> None:
    path = write(tmp_path / name, texts(text, 2000 if name == "data.jsonl" else 400))
    monkeypatch.setattr(survey_module, "SAMPLE_CHARACTERS", 20_000)
    monkeypatch.setattr("parallelmind.data.pipeline.SAMPLE_CHARACTERS", 20_000)
    data = config(path, **settings)
    assert 0 < len(survey_files([str(path)], data).sample) < 400
    assert estimate(path, data) == estimate(path, data)  # as a resumed run requires
    assert estimate(path, data) == pytest.approx(count(path, data), rel=0.15)


def test_records_longer_than_the_sample_are_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "data.jsonl", [{"main": "", "branches": [ENGLISH] * 50}] * 40)
    monkeypatch.setattr(survey_module, "SAMPLE_CHARACTERS", 20)
    monkeypatch.setattr("parallelmind.data.pipeline.SAMPLE_CHARACTERS", 20)
    data = config(path, batch_tokens=4096)
    assert estimate(path, data) == pytest.approx(count(path, data), rel=0.15)


def test_batches_larger_than_the_sample_are_not_rounded_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "data.jsonl", texts(ENGLISH, 4000))
    monkeypatch.setattr(survey_module, "SAMPLE_CHARACTERS", 20_000)
    monkeypatch.setattr("parallelmind.data.pipeline.SAMPLE_CHARACTERS", 20_000)
    data = config(path, batch_tokens=60_000, length_window=1)
    assert estimate(path, data) == pytest.approx(count(path, data), rel=0.15)


def test_truncated_and_skipped_texts_are_counted_or_estimated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = {"main": ENGLISH * 3, "branches": ["who", ENGLISH * 3, {"text": ENGLISH * 3, "answer_offset": 20}]}
    path = write(tmp_path / "data.jsonl", [long, {"text": "who"}, {"text": "where"}] * 500)
    data = config(path, max_branch_tokens=16)
    whole = epoch(path, data)
    assert (whole.truncated, whole.skipped, whole.exact) == (1000, 500, True)
    monkeypatch.setattr(survey_module, "SAMPLE_CHARACTERS", 20_000)
    monkeypatch.setattr("parallelmind.data.pipeline.SAMPLE_CHARACTERS", 20_000)
    sampled = epoch(path, data)
    assert not sampled.exact
    assert sampled.truncated == pytest.approx(1000, rel=0.2)
    assert sampled.skipped == pytest.approx(500, rel=0.2)
