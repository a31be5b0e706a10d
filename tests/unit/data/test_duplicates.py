"""Records that occur twice, or in two data sets, are counted; in large data their number is estimated."""

from __future__ import annotations

import pytest

from parallelmind.data.duplicates import RecordHashes, hash_share, pack_hashes, record_hash
from parallelmind.data.record_parser import parse_value


def hashes(texts: list[str], share: float = 1.0) -> RecordHashes:
    values = [record_hash(parse_value({"text": text})) for text in texts]
    return RecordHashes.unpack(pack_hashes(values[:3], share) + pack_hashes(values[3:], share), share)


def test_repeated_and_shared_records_are_counted_exactly() -> None:
    train, held_out = hashes(["a", "b", "a", "c", "a", "c"]), hashes(["c", "x", "a", "a"])
    assert (train.repeated(), held_out.repeated(), hashes([]).repeated()) == (3, 1, 0)
    assert held_out.shared_with(train) == 3
    assert (hashes([]).shared_with(train), train.shared_with(hashes([]))) == (0, 0)


def test_content_decides_and_metadata_and_spelling_do_not() -> None:
    same = [
        {"main": "m", "branches": ["a"], "id": 1},
        {"branches": [{"text": "a", "source": "x"}], "main": {"text": "m"}},
        {"main": "m", "text": "a", "answer_offset": 0},
    ]
    other = [
        {"main": "m", "branches": ["b"]},
        {"branches": ["m", "a"]},
        {"main": "m", "branches": [{"text": "a", "answer_offset": 1}]},
        {"main": "m", "branches": [{"prompt": "a", "completion": "b"}]},
    ]
    assert len({record_hash(parse_value(value)) for value in same}) == 1
    pair = {"prompt": "a", "completion": "b"}
    assert record_hash(parse_value(pair)) == record_hash(parse_value({**pair, "references": ["c"]}))
    assert len({record_hash(parse_value(value)) for value in (same[0], *other)}) == 1 + len(other)


def test_the_shape_and_all_segments_of_a_tree_count() -> None:
    def with_below(**below: object) -> int:
        return record_hash(
            parse_value({"main": "m", "branches": [{"text": "a", **below}, "b"], "reduce": "r"})
        )

    values = [
        with_below(),
        with_below(branches=["c", "d"]),
        with_below(branches=["c", "e"]),
        with_below(branches=["c"], reduce="d"),
        with_below(branches=[{"text": "c", "branches": ["d"]}]),
        record_hash(parse_value({"main": "m", "branches": ["a", "b", "r"]})),
        record_hash(parse_value({"main": "m", "branches": ["a", "b"]})),
    ]
    assert len(set(values)) == len(values)
    assert with_below(branches=["c", "d"], id=3) == values[1]


def test_hashes_of_flat_records_are_those_of_version_0_1() -> None:
    value = {"main": "m", "branches": ["a", {"prompt": "p", "completion": "c"}]}
    assert record_hash(parse_value(value)) == 8276623100112984612


def test_counts_of_large_data_are_estimated_from_the_same_share_of_all_records() -> None:
    assert hash_share(10) == 1
    assert hash_share(1 << 32) == 0.25
    texts = [str(number) for number in range(4000)]
    train, held_out = hashes(texts + texts[:2000], share=0.25), hashes(texts[-1000:])
    assert len(train.values) < 2000
    assert train.repeated() == pytest.approx(2000, rel=0.15)
    assert held_out.shared_with(train) == pytest.approx(1000, rel=0.2)
