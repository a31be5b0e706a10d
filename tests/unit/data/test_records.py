"""Parse parallel JSONL: every form of a record, and the reason why a line is not one."""

from __future__ import annotations

import json

import pytest

from parallelmind.data.records import Branch, Record, RecordError, parse_line


def parse(value: object, vocab_size: int | None = None) -> Record:
    return parse_line(json.dumps(value).encode(), vocab_size)


def test_every_form_of_a_record() -> None:
    record = parse(
        {
            "main": "passage",
            "branches": [
                "plain",
                {"text": "with offset", "answer_offset": 2},
                {"prompt": "q", "completion": "a"},
                {"input_ids": [3, 4], "answer_offset": 1},
                {"text": "of a template", "targets": [[1, 2], [3, 5]], "rendered": True},
            ],
            "id": 7,
        }
    )
    assert record == Record(
        "passage",
        (
            Branch("plain"),
            Branch("with offset", targets=((2, None),)),
            Branch("q", "a"),
            Branch([3, 4], targets=((1, None),)),
            Branch("of a template", targets=((1, 2), (3, 5)), rendered=True),
        ),
        standalone=False,
        unknown_keys=("id",),
    )
    assert parse({"text": "alone", "answer_offset": 1}) == Record(
        "", (Branch("alone", targets=((1, None),)),), standalone=True
    )
    assert parse({"input_ids": [1, 2]}).branches[0].body == [1, 2]
    assert parse({"main": {"input_ids": [5]}, "branches": ["b"]}).main == [5]
    assert parse({"branches": ["b"]}).main == ""
    with_references = {"prompt": "q", "completion": "a", "references": ["b", "c"]}
    assert parse({"branches": [with_references]}).branches == (Branch("q", "a", references=("b", "c")),)
    assert parse(with_references).branches == (Branch("q", "a", references=("b", "c")),)


def test_unicode_line_separators_are_text_and_a_byte_order_mark_is_ignored() -> None:
    raw = '{"text": "a\u2028b\u0085c"}'.encode()
    assert parse_line(raw).branches[0].body == "a\u2028b\u0085c"
    assert parse_line(b"\xef\xbb\xbf" + raw) == parse_line(raw)


@pytest.mark.parametrize(
    ("value", "branch"),
    [
        ({"prompt": " q?", "completion": " a"}, Branch(" q?", " a")),
        ({"text": " q? a", "answer_offset": 2}, Branch(" q? a", targets=((2, None),))),
        ({"input_ids": [3, 4]}, Branch([3, 4])),
    ],
)
def test_main_beside_a_single_text_is_a_sample_of_one_branch(
    value: dict[str, object], branch: Branch
) -> None:
    assert parse({"main": "passage", **value}) == Record("passage", (branch,), standalone=False)
    assert parse({"main": {"input_ids": [5]}, **value}) == Record([5], (branch,), standalone=False)
    assert parse({"main": "", **value}) == parse(value) == Record("", (branch,), standalone=True)


def test_keys_without_a_meaning_are_kept_wherever_they_stand() -> None:
    branches = [{"text": "a", "id": 1}, {"prompt": "q", "completion": "c", "id": 2, "weight": 1}, "plain"]
    record = parse({"main": {"text": "m", "title": "t"}, "branches": branches, "references": [], "id": 0})
    assert record.unknown_keys == ("references", "id", "main.title", "branches[].id", "branches[].weight")


TEXT, PAIR = {"text": "a"}, {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (TEXT, "texts"),
        (TEXT, "branch"),
        (TEXT, "complation"),
        (TEXT, "prompt_id"),
        (TEXT, "domain"),
        (TEXT, "main_id"),
        (TEXT, "Text"),
        (TEXT, "answer_offset_characters"),
        ({**TEXT, "answer_offset": 1}, "answer_offsets"),
        (PAIR, "texts"),
        (PAIR, "prompt_id"),
        (PAIR, "completions"),
        (PAIR, "answer_offsets"),
        (PAIR, "references_count"),
        (PAIR, "reference"),
        ({"main": "m", "branches": ["a"]}, "main_id"),
        ({"main": "m", "branches": ["a"]}, "mains"),
        ({"branches": ["a"]}, "branch"),
    ],
)
def test_a_key_is_metadata_if_nothing_that_it_resembles_is_missing(
    value: dict[str, object], key: str
) -> None:
    assert parse({**value, key: "x"}).unknown_keys == (key,)
    if "branches" not in value:
        assert parse({"branches": [{**value, key: "x"}]}).unknown_keys == (f"branches[].{key}",)


@pytest.mark.parametrize("value", [TEXT, PAIR, {"main": "m", "branches": [PAIR, TEXT]}, {"input_ids": [1]}])
def test_a_null_field_is_absent(value: dict[str, object]) -> None:
    keys = ("main", "branches", "text", "input_ids", "prompt", "completion", "references", "targets")
    nulls: dict[str, object] = dict.fromkeys((*keys, "answer_offset", "rendered", "note"))
    assert parse({**nulls, **value}) == parse(value)
    assert parse({"branches": [{**nulls, **PAIR}]}) == parse({"branches": [PAIR]})
    assert parse({"main": {**nulls, **TEXT}, "branches": ["a"]}) == parse({"main": TEXT, "branches": ["a"]})


@pytest.mark.parametrize(
    ("value", "key", "meant"),
    [
        ({"prompt": "a"}, "complation", "completion"),
        ({"prompt": "a"}, "Completion", "completion"),
        ({"completion": "a"}, "promt", "prompt"),
        ({}, "texts", "text"),
        ({}, "input_id", "input_ids"),
        (TEXT, "answer_ofset", "answer_offset"),
    ],
)
def test_a_key_is_misspelt_if_the_key_that_is_meant_is_missing(
    value: dict[str, object], key: str, meant: str
) -> None:
    for record in ({**value, key: 1}, {"branches": [{**value, key: 1}]}):
        with pytest.raises(RecordError, match=rf"'{key}' \(did you mean {meant}\?\)"):
            parse(record)


@pytest.mark.parametrize(
    ("record", "meant"),
    [
        ({"mains": "m", "text": "a"}, "main"),
        ({"Main": "m", "branches": ["a"]}, "main"),
        ({"main": "m", "branchs": ["a"]}, "branches"),
        ({"main": {"texts": "m"}, "branches": ["a"]}, "text"),
    ],
)
def test_misspelt_keys_of_a_record(record: dict[str, object], meant: str) -> None:
    with pytest.raises(RecordError, match=f"did you mean {meant}"):
        parse(record)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "is not JSON"),
        (b'{"text": "a"} {"text": "b"}', "is not JSON"),
        (b"[1]", "is a JSON array, not an object"),
        (b"null", "is a JSON null"),
        (b'{"text": "\xff"}', "byte 10 is not UTF-8"),
        (b'{"text": NaN}', "NaN is not a JSON number"),
        (b'{"text": "a", "text": "b"}', "'text' twice"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": 1}', "record.text is a JSON number"),
        (b'{"text": ""}', "record is empty"),
        (b"{}", "needs either text or input_ids"),
        (b'{"text": "a", "input_ids": [1]}', "record has input_ids beside text"),
        (b'{"text": "a", "answer_offset": -1}', "answer_offset=-1"),
        (b'{"text": "a", "answer_offset": true}', "answer_offset=True"),
        (b'{"text": "a", "answer_offset": 1.0}', "answer_offset=1.0"),
        (b'{"text": "a", "answer_ofset": 1}', "did you mean answer_offset"),
        (b'{"text": "a", "answer_offset": 1, "targets": [[1, 2]]}', "both answer_offset and targets"),
        (b'{"text": "a", "targets": []}', "must be a list of [start, end]"),
        (b'{"text": "a", "targets": [[1, 1]]}', "must be a list of [start, end]"),
        (b'{"text": "a", "targets": [[-1, 1]]}', "must be a list of [start, end]"),
        (b'{"text": "a", "targets": [[0, true]]}', "must be a list of [start, end]"),
        (b'{"text": "a", "targets": [[0, 3], [2, 4]]}', "sorted and disjoint"),
        (b'{"text": "a", "targets": [[3, 4], [0, 1]]}', "sorted and disjoint"),
        (b'{"input_ids": [1, 2], "targets": [[1, 3]]}', "ends at 3, and the branch has 2 tokens"),
        (b'{"prompt": "a", "completion": "b", "targets": [[1, 3]]}', "targets beside completion"),
        (b'{"text": "a", "rendered": 1}', "rendered=1 must be true or false"),
        (b'{"input_ids": [1, 2], "rendered": true}', "has rendered beside input_ids"),
        (b'{"main": "m", "branches": []}', "at least one branch"),
        (b'{"main": "m", "branches": "a"}', "must be a list"),
        (b'{"main": "m", "branches": ["a", 2]}', "branches[1] is a JSON number"),
        (b'{"main": "m", "branches": [{"prompt": "a"}]}', "branches[0] has no completion"),
        (b'{"main": "m", "branches": [{"prompt": "a", "completion": ""}]}', "completion is empty"),
        (
            b'{"main": "m", "branches": [{"prompt": "a", "completion": "b", "answer_offset": 1}]}',
            "branches[0] has answer_offset beside completion and prompt",
        ),
        (
            b'{"main": "m", "branches": ["a"], "prompt": "q", "completion": "c"}',
            "has completion beside branches",
        ),
        (b'{"main": "m", "branches": ["a"], "answer_offset": 2}', "has answer_offset beside branches"),
        (b'{"branches": ["a"], "text": "b"}', "record has text beside branches"),
        (b'{"branches": [{"text": "a", "main": "m"}]}', "branches[0] has main beside text"),
        (b'{"branches": [{"text": "a", "branches": ["b"]}]}', "branches[0] has branches beside text"),
        (
            b'{"main": {"text": "m", "answer_offset": 1}, "branches": ["a"]}',
            "main has answer_offset beside text",
        ),
        (b'{"prompt": "a", "completion": "b", "references": "c"}', "references is a JSON string, not a list"),
        (b'{"prompt": "a", "completion": "b", "references": [""]}', "references is empty"),
        (b'{"input_ids": [1, -2]}', "must be a list of token ids"),
        (b'{"input_ids": [1, true]}', "must be a list of token ids"),
        (b'{"input_ids": [1, 99]}', "holds 99, and the tokenizer has 10 tokens"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_reason_of_a_bad_line(raw: bytes, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_line(raw, vocab_size=10)
    assert reason in str(caught.value)
