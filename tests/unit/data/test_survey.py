"""Every line is a record, or a bad line with its offset and reason, whatever its neighbours hold."""

from __future__ import annotations

import json

import pytest

from parallelmind.config import DataConfig
from parallelmind.data import files as files_module
from parallelmind.data.files import file_parts
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
