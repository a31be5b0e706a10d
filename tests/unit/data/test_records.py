"""Parse parallel JSONL: every form of a record, and the reason why a line is not one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from parallelmind.data.record_parser import parse_line, parse_value
from parallelmind.data.records import MAX_DEPTH, Record, RecordError, Segment


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
            Segment("plain"),
            Segment("with offset", targets=((2, None),)),
            Segment("q", "a"),
            Segment([3, 4], targets=((1, None),)),
            Segment("of a template", targets=((1, 2), (3, 5)), rendered=True),
        ),
        standalone=False,
        unknown_keys=("id",),
    )
    assert parse({"text": "alone", "answer_offset": 1}) == Record(
        "", (Segment("alone", targets=((1, None),)),), standalone=True
    )
    assert parse({"input_ids": [1, 2]}).branches[0].body == [1, 2]
    assert parse({"main": {"input_ids": [5]}, "branches": ["b"]}).main == [5]
    assert parse({"branches": ["b"]}).main == ""
    with_references = {"prompt": "q", "completion": "a", "references": ["b", "c"]}
    assert parse({"branches": [with_references]}).branches == (Segment("q", "a", references=("b", "c")),)
    assert parse(with_references).branches == (Segment("q", "a", references=("b", "c")),)


def test_unicode_line_separators_are_text_and_a_byte_order_mark_is_ignored() -> None:
    raw = '{"text": "a\u2028b\u0085c"}'.encode()
    assert parse_line(raw).branches[0].body == "a\u2028b\u0085c"
    assert parse_line(b"\xef\xbb\xbf" + raw) == parse_line(raw)


@pytest.mark.parametrize(
    ("value", "branch"),
    [
        ({"prompt": " q?", "completion": " a"}, Segment(" q?", " a")),
        ({"text": " q? a", "answer_offset": 2}, Segment(" q? a", targets=((2, None),))),
        ({"input_ids": [3, 4]}, Segment([3, 4])),
    ],
)
def test_main_beside_a_single_text_is_a_sample_of_one_branch(
    value: dict[str, object], branch: Segment
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


def test_a_value_that_json_lacks_is_named_by_its_type() -> None:
    with pytest.raises(RecordError, match="^main is a bytes, not text$"):
        parse_value({"main": b"a", "branches": ["b"]})


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
        (b'{"text": "a", "targets": []}', "targets=[] in every segment"),
        (b'{"text": "a", "targets": [[]]}', "must be a list of [start, end]"),
        (b'{"text": "a", "targets": [[1, 1]]}', "must be a list of [start, end]"),
        (b'{"text": "a", "targets": [[-1, 1]]}', "must be a list of [start, end]"),
        (b'{"text": "a", "targets": [[0, true]]}', "must be a list of [start, end]"),
        (b'{"text": "a", "targets": [[0, 3], [2, 4]]}', "sorted and disjoint"),
        (b'{"text": "a", "targets": [[3, 4], [0, 1]]}', "sorted and disjoint"),
        (b'{"input_ids": [1, 2], "targets": [[1, 3]]}', "record.targets ends at 3, and record has 2 tokens"),
        (b'{"prompt": "a", "completion": "b", "targets": [[1, 3]]}', "targets beside completion"),
        (b'{"text": "a", "rendered": 1}', "rendered=1 must be true or false"),
        (b'{"input_ids": [1, 2], "rendered": true}', "has rendered beside input_ids"),
        (b'{"main": "m", "branches": []}', "at least one branch"),
        (b'{"main": "m", "branches": "a"}', "must be a list"),
        (b'{"main": "m", "branches": ["a", 2]}', "branches[1] is a JSON number"),
        (
            b'{"main": "m", "branches": [{"prompt": "a"}]}',
            "branches[0] has no completion; give one, or a prompt",
        ),
        (
            b'{"main": "m", "branches": ["a"], "reduce": {"completion": "b"}}',
            "reduce has no prompt; give one",
        ),
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
        (b'{"text": "a", "branches": ["b"]}', "record has text beside branches"),
        (b'{"text": "a", "rendered": ' + b"[" * 500 + b"]" * 500 + b"}", "...]]]]]]] must be true or false"),
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


DEEP = {
    "main": "m",
    "branches": [
        "plain",
        {
            "prompt": "q",
            "completion": "a",
            "branches": [{"text": "b", "targets": []}, {"input_ids": [3, 4], "branches": ["c"]}],
            "reduce": {"text": "r", "branches": ["d", "e"], "reduce": "s"},
        },
    ],
    "reduce": {"prompt": "t", "completion": "u", "references": ["v"]},
}


def test_a_record_is_a_tree_of_segments() -> None:
    record = parse(DEEP)
    below = (Segment("b", targets=()), Segment([3, 4], branches=(Segment("c"),)))
    reduce = Segment("r", branches=(Segment("d"), Segment("e")), reduce=Segment("s"))
    assert record == Record(
        "m",
        (Segment("plain"), Segment("q", "a", branches=below, reduce=reduce)),
        standalone=False,
        reduce=Segment("t", "u", references=("v",)),
    )
    assert [segment.body for segment in record.walk()] == ["plain", "q", "b", [3, 4], "c", *"rdest"]
    assert record.tree.parents.tolist() == [-1, 0, 0, 2, 2, 4, 2, 6, 6, 6, 0]
    assert np.flatnonzero(record.tree.is_reduce).tolist() == [6, 9, 10]
    assert (record.num_branches, record.is_flat) == (7, False)


def test_a_record_of_main_and_branches_is_flat() -> None:
    record = parse({"main": "m", "branches": ["a", "b"]})
    assert (record.num_branches, record.is_flat, record.tree.is_flat) == (2, True, True)
    assert parse({"branches": ["a"], "reduce": None}).is_flat
    assert not parse({"branches": ["a"], "reduce": "b"}).is_flat


def test_unknown_keys_of_a_tree_are_named_by_where_they_stand() -> None:
    inner = {"text": "b", "id": 1, "reduced": True}
    branch = {"text": "a", "branches": [inner, inner], "reduce": {"text": "r", "id": 2}}
    record = parse({"branches": [branch, branch], "reduce": {"text": "s", "score": 0.5}, "id": 3})
    assert record.unknown_keys == (
        *("id", "branches[].branches[].id", "branches[].branches[].reduced"),
        *("branches[].reduce.id", "reduce.score"),
    )


def test_an_object_of_nulls_is_absent() -> None:
    """Some writers of Parquet write one where a row has no reduce."""
    nulls = {"prompt": None, "completion": None, "reduce": {"prompt": None}}
    assert parse({"main": "m", "branches": [PAIR], "reduce": nulls}) == parse(
        {"main": "m", "branches": [PAIR]}
    )
    assert parse({"branches": [{**PAIR, "reduce": nulls}]}) == parse({"branches": [PAIR]})


@pytest.mark.parametrize("nested", [False, True])
def test_null_fields_of_a_tree_are_absent(nested: bool) -> None:
    nulls = dict.fromkeys(("text", "branches", "reduce", "input_ids", "targets", "rendered"))
    pair = {"prompt": "a", "completion": "b"}
    tree = {"branches": [{**pair, "branches": [pair], "reduce": pair}], "reduce": pair}
    written = {
        "branches": [{**nulls, **pair, "branches": [{**nulls, **pair}], "reduce": {**nulls, **pair}}],
        "reduce": {**nulls, **pair},
    }
    wrap = (lambda value: {"branches": [{**pair, **value}]}) if nested else (lambda value: value)
    assert parse(wrap(written)) == parse(wrap(tree))


def nested(depth: int, key: str = "branches") -> dict[str, object]:
    """A record with this many levels of `branches`, nested in branches or in reduces."""
    below: dict[str, object] = {"text": "leaf"}
    for _ in range(depth - 1):
        below = {"text": "a", "branches": [below]} if key == "branches" else {**FORK, "reduce": below}
    return {"branches": [below]} if key == "branches" else {"branches": ["b"], "reduce": below}


FORK = {"text": "a", "branches": ["b"]}


@pytest.mark.parametrize("key", ["branches", "reduce"])
def test_depth_is_limited(key: str) -> None:
    assert sum(1 for _ in parse(nested(MAX_DEPTH, key)).walk()) >= MAX_DEPTH
    for depth in (MAX_DEPTH + 1, 300):
        with pytest.raises(RecordError, match=f"nested more than {MAX_DEPTH} deep"):
            parse(nested(depth, key))
    with pytest.raises(RecordError, match=f"nested more than {MAX_DEPTH} deep"):
        parse_value(nested(20_000, key))  # a row of Parquet is not bounded as JSON is


@pytest.mark.parametrize(
    ("below", "reason"),
    [
        ({"branches": []}, "branches[1].branches must be a list of at least one branch"),
        ({"branches": "b"}, "branches[1].branches must be a list"),
        ({"branches": ["b", 3]}, "branches[1].branches[1] is a JSON number, not text or an object"),
        ({"branches": [""]}, "branches[1].branches[0] is empty"),
        ({"reduce": "b"}, "branches[1] has reduce without branches"),
        ({"branches": None, "reduce": "b"}, "branches[1] has reduce without branches"),
        ({"branches": ["b"], "reduce": 3}, "branches[1].reduce is a JSON number"),
        ({"branches": ["b"], "reduce": {}}, "branches[1].reduce needs either text or input_ids"),
        ({"branches": ["b"], "reduce": [{"text": "c"}]}, "branches[1].reduce is a JSON array"),
        ({"branches": ["b"], "reduced": "c"}, "branches[1] has the key 'reduced' (did you mean reduce?)"),
        ({"branchs": ["b"]}, "branches[1] has the key 'branchs' (did you mean branches?)"),
        ({"branches": ["b"], "main": "c"}, "branches[1] has main beside"),
        ({"branches": [{"text": "b", "prompt": "c"}]}, "branches[1].branches[0] has"),
        ({"branches": [{"branches": ["b"]}]}, "branches[1].branches[0] needs either text or input_ids"),
        (
            {"branches": [{"main": "a", "branches": ["b"]}]},
            "branches[1].branches[0] has main, which only a re",
        ),
        ({"branches": [{"text": "b", "answer_ofset": 1}]}, "did you mean answer_offset"),
        (
            {"branches": [{"text": "b", "branches": ["c"], "reduce": {"prompt": "", "completion": "d"}}]},
            "branches[1].branches[0].reduce.prompt is empty; with nested branches or a reduce",
        ),
    ],
)
def test_reason_of_a_bad_tree(below: dict[str, object], reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse({"main": "m", "branches": ["a", {"text": "a", **below}]})
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b'{"main": "m", "reduce": "r"}', "record has reduce without branches"),
        (b'{"text": "a", "reduce": "r"}', "record has reduce without branches"),
        (b'{"main": {"text": "m", "branches": ["b"]}, "branches": ["a"]}', "main has branches beside text"),
        (b'{"branches": [{"prompt": "", "completion": "a"}], "reduce": "r"}', "branches[0].prompt is empty"),
        (b'{"branches": [{"text": "a", "branches": ["b"], "branches": ["c"]}]}', "'branches' twice"),
        (
            b'{"branches": [{"text": "a", "targets": []}], "reduce": {"text": "r", "targets": []}}',
            "has targets=[] in every segment; give at least one of them a target",
        ),
    ],
)
def test_reason_of_a_bad_reduce(raw: bytes, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_line(raw)
    assert reason in str(caught.value)


def test_a_branch_of_a_flat_record_needs_no_prompt() -> None:
    value = {"branches": [{"prompt": "", "completion": "a"}]}
    assert parse(value).branches == (Segment("", "a"),)
