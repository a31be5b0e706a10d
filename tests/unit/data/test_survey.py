"""Every line is a record, or a bad line with its offset and reason, whatever its neighbours hold."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from parallelmind.config import DataConfig
from parallelmind.data import files as files_module
from parallelmind.data.files import file_parts
from parallelmind.data.record_parser import parse_value
from parallelmind.data.records import MAX_DEPTH
from parallelmind.data.survey import Survey, combine_surveys, read_records, survey_part, write_quarantine
from parallelmind.errors import UserError

GOOD = [
    b'{"text": "plain"}',
    '{"text": "line\u2028and\u0085next"}'.encode(),
    b'{"text": "with a return"}\r',
    b'{"text": "an id", "id": 7, "source": "here"}',
    b'{"main": "m", "branches": ["a", {"text": "b", "answer_offset": 1}, {"prompt": "", "completion": "c"}]}',
    b'{"input_ids": [5, 6, 7]}',
]
BAD = {
    b'{"text": "torn': "not JSON",
    b"{'text': 'quotes'}": "not JSON",
    b'{"text": "a"} {"text": "b"}': "not JSON",
    b'{"text": "a", "text": "b"}': "twice",
    b'{"text": "a", "answer_offset": NaN}': "NaN",
    b'{"text": "\x00"}': "not JSON",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\\ud800"}': "surrogate",
    b'{"text": ' + b"[" * 100_000: "nested too deeply",
    b'{"text": "a", "answer_offset": ' + b"9" * 5_000 + b"}": "not JSON",
    b"[1, 2]": "array, not an object",
    b'"text"': "string, not an object",
    b"null": "null, not an object",
    b"{}": "needs either text or input_ids",
    b'{"main": "m", "branches": []}': "at least one branch",
    b'{"main": "m", "branches": "a"}': "at least one branch",
    b'{"main": 5, "branches": ["a"]}': "number, not text",
    b'{"text": ""}': "empty",
    b'{"input_ids": [1, -2]}': "token ids",
    b'{"texts": "a"}': "did you mean text",
    b'{"prompt": "a"}': "no completion",
    b'{"text": "a", "answer_offset": -1}': "answer_offset=-1",
}


def config(**settings: object) -> DataConfig:
    return DataConfig.model_validate({"data_path": "-", **settings})


def survey_of(*files, **settings) -> Survey:
    parts = file_parts([str(file) for file in files])
    return combine_surveys(parts, [survey_part(part, config(**settings), vocab_size=1000) for part in parts])


@pytest.mark.parametrize("part_bytes", [50, 1000, 10**9])
def test_one_bad_line_costs_no_neighbour(tmp_path, monkeypatch, part_bytes):
    monkeypatch.setattr(files_module, "_MIN_PART_BYTES", part_bytes)
    monkeypatch.setattr(files_module, "_MAX_PART_BYTES", part_bytes)
    lines, expected = [], []
    for number, (bad, reason) in enumerate(BAD.items()):
        good = GOOD[number % len(GOOD)]
        lines += [good, bad, b"", b"  "]
        expected.append((len(lines) - 2, sum(map(len, lines[:-3])) + len(lines) - 3, reason))
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    survey = survey_of(file)
    assert survey.lines == survey.records + len(survey.bad) == 2 * len(BAD)
    for item, (line, offset, reason) in zip(survey.bad, expected, strict=True):
        assert (item.line, item.offset - 3) == (line, offset)
        assert reason in item.reason, item
    assert survey.unknown_keys == {"id": 4, "source": 4}
    good = [record for part in file_parts([str(file)]) for record in read_records(part, config(), 1000)]
    assert len(good) == len(BAD)
    assert good[1].branches[0].body == "line\u2028and\u0085next"


TREE = {
    "main": "m",
    "branches": [
        {"prompt": "q", "completion": "a", "id": 1},
        {
            "prompt": "q",
            "completion": "a",
            "branches": [{"text": "b", "targets": []}],
            "reduce": {"input_ids": [5, 6], "answer_offset": 1},
        },
    ],
    "reduce": {"text": "r", "targets": [[1, 2]], "branches": [{"text": "c"}]},
}
FLAT = {"main": "m", "branches": [{"text": "a", "rendered": True}, {"text": "b"}]}


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_trees_are_counted_at_all_depths_and_equal_in_both_formats(tmp_path, name):
    file = write_table(tmp_path / name, [TREE, FLAT, TREE])
    survey = survey_of(file)
    assert (survey.lines, survey.records, survey.branches, survey.reduces) == (3, 3, 10, 4)
    assert survey.unknown_keys == {"branches[].id": 2}
    assert survey.hashes.repeated() == 1
    assert survey.sample == [parse_value(TREE)]
    (part,) = file_parts([str(file)])
    assert list(read_records(part, config(), 1000)) == [parse_value(value) for value in (TREE, FLAT, TREE)]


PARQUET_DEPTH = 62  # of branches in branches; pyarrow writes more, and cannot read them


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_the_deepest_trees_are_read_from_both_formats(tmp_path, name):
    depth = MAX_DEPTH if name == "data.jsonl" else PARQUET_DEPTH
    survey = survey_of(write_table(tmp_path / name, [nested(depth), FLAT]))
    assert (survey.records, survey.branches) == (2, depth + 2)
    survey = survey_of(write_table(tmp_path / name, [chain(MAX_DEPTH), FLAT]))
    assert (survey.records, survey.branches, survey.reduces) == (2, MAX_DEPTH + 2, MAX_DEPTH)


def nested(depth):
    branch = {"text": "leaf"}
    for _ in range(depth - 1):
        branch = {"text": "a", "branches": [branch]}
    return {"branches": [branch]}


def chain(depth):
    """A text that forks and joins this many times, one after another."""
    reduce = {"text": "end"}
    for _ in range(depth - 1):
        reduce = {"text": "a", "branches": [{"text": "b"}], "reduce": reduce}
    return {"branches": [{"text": "b"}], "reduce": reduce}


def write_table(path, records):
    """The records as JSONL, or as Parquet, in which every field that a record lacks is null."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_bad_tree_costs_no_neighbour(tmp_path):
    bad = [
        ({"main": "m", "reduce": "r"}, "record has reduce without branches"),
        (nested(MAX_DEPTH + 1), f"nested more than {MAX_DEPTH} deep"),
        (nested(200), f"nested more than {MAX_DEPTH} deep"),
        (
            {"branches": [{"text": "a", "branches": []}]},
            "branches[0].branches must be a list of at least one",
        ),
        ({"branches": [{"prompt": "", "completion": "a"}], "reduce": "r"}, "branches[0].prompt is empty"),
    ]
    lines = [line for value, _ in bad for line in (json.dumps(TREE), json.dumps(value))]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join([*lines, '{"branches": [' * 5000, json.dumps(FLAT)]))
    survey = survey_of(file)
    assert (survey.records, len(survey.bad)) == (len(bad) + 1, len(bad) + 1)
    for item, reason in zip(survey.bad, [*(reason for _, reason in bad), "nested too deeply"], strict=True):
        assert reason in item.reason
        assert "\n" not in item.reason


def test_line_numbers_begin_anew_in_every_file(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(GOOD[0] + b"\nbroken\n")
    survey = survey_of(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert [(item.file[-7:], item.line, item.offset) for item in survey.bad] == [
        ("a.jsonl", 2, 18),
        ("b.jsonl", 2, 18),
    ]


def test_the_quarantine_names_place_and_reason(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(GOOD[0] + b"\n{\n")
    write_quarantine(tmp_path / "quarantine.jsonl", survey_of(file).bad)
    (row,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert row == {"file": str(file), "offset": 18, "line": 2, "reason": row["reason"]}
    assert "not JSON" in row["reason"]


def test_records_with_too_many_branches_are_split_or_bad(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"main": "m", "branches": ["a", "b", "c"]}\n{"text": "a"}\n')
    assert survey_of(file, max_branches_per_sample=2).records == 2
    refused = survey_of(file, max_branches_per_sample=2, overfull="refuse")
    assert (refused.records, len(refused.bad)) == (1, 1)
    assert "has 3 branches, more than max_branches_per_sample=2" in refused.bad[0].reason


def test_branches_of_all_depths_count_towards_the_limit(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(TREE))
    assert survey_of(file, max_branches_per_sample=4, overfull="refuse").records == 1
    (bad,) = survey_of(file, max_branches_per_sample=3, overfull="refuse").bad
    assert "has 4 branches, more than max_branches_per_sample=3" in bad.reason
    questions = {"text": "?", "branches": ["a", "b"]}
    file.write_text(json.dumps({"documents": ["x", "y", "z"], "reduce": questions}))
    assert survey_of(file, max_branches_per_sample=2, overfull="refuse").records == 1


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, None),
        ({"max_bad_records": 2.0}, None),
        ({"max_bad_records": 1.0}, "max_bad_records=1: 2 of 8 lines are bad, the first: .*data.jsonl:7"),
        ({"max_bad_records": 0.5}, None),
        ({"max_bad_records": 0.1}, "max_bad_records=0.1: 2 of 8"),
        ({"max_bad_records": 0.0}, "max_bad_records=0: 2 of 8"),
        ({"strict": True}, "data.jsonl:7: .*strict=false"),
    ],
)
def test_how_many_bad_lines_are_too_many(tmp_path, settings, complaint):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\n".join([*GOOD, b"{", b"}"]))
    survey = survey_of(file, **settings)
    if complaint is None:
        survey.raise_if_unusable(config(**settings), "data_path")
    else:
        with pytest.raises(UserError, match=complaint):
            survey.raise_if_unusable(config(**settings), "data_path")


def test_no_record_at_all_is_refused(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"{\n\n")
    with pytest.raises(UserError, match=r"holds no record \(bad lines: 1, the first: .*data.jsonl:1"):
        survey_of(file).raise_if_unusable(config(), "data_path")
