"""Tokenised records keep to the length limits, and to what decoding reads."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import Segment, reference_tree, walk
from tiny import tiny_tokenizer
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from trees import TREES, shape_of

from parallelmind.config import DataConfig, RopeConfig
from parallelmind.data.encode import encode_text
from parallelmind.data.record_parser import parse_line
from parallelmind.data.tokenise import TokenisedRecord, tokenise
from parallelmind.layout import Tokens

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def tokenise_one(value: object, **settings: object) -> TokenisedRecord:
    config = DataConfig.model_validate({"data_path": "-", **settings})
    (record,) = tokenise([parse_line(json.dumps(value).encode())], TOKENIZER, config)
    return record


def test_prompt_equals_what_decoding_reads_and_completion_ends_with_eos() -> None:
    tokens = tokenise_one({"main": "passage", "branches": [{"prompt": "who ", "completion": "lives"}]}).tokens
    assert tokens is not None
    main = encode_text(TOKENIZER, "passage", first=True)
    prompt = encode_text(TOKENIZER, "who ", first=False)
    completion = encode_text(TOKENIZER, "lives", first=False)
    assert tokens.ids.tolist() == [*main, *prompt, *completion, EOS]
    first_target = len(main) + len(prompt)
    assert tokens.targets.tolist() == [False] * first_target + [True] * (len(completion) + 1)


def test_text_ends_with_eos_and_ids_stay_as_they_are() -> None:
    text = tokenise_one({"text": "lives"}).tokens
    ids = tokenise_one({"input_ids": [5, 6, 7], "answer_offset": 2}).tokens
    assert text is not None
    assert ids is not None
    assert text.ids.tolist() == [*encode_text(TOKENIZER, "lives", first=True), EOS]
    assert (ids.ids.tolist(), ids.targets.tolist()) == ([5, 6, 7], [False, False, True])


@pytest.mark.parametrize("value", [{"text": "who lives"}, {"prompt": "who", "completion": " lives"}])
def test_an_end_token_that_is_written_is_not_added_again(value: dict[str, str]) -> None:
    *_, key = value
    plain, written = tokenise_one(value).tokens, tokenise_one({**value, key: f"{value[key]}</s>"}).tokens
    assert plain is not None
    assert written is not None
    assert written.ids.tolist() == plain.ids.tolist()
    assert written.targets.tolist() == plain.targets.tolist()


def test_targets_are_the_tokens_of_the_spans_and_keep_to_them_when_truncated() -> None:
    value = {"input_ids": [*range(3, 15)], "targets": [[0, 2], [5, 6], [10, 12]]}
    whole, cut = tokenise_one(value).tokens, tokenise_one(value, max_branch_tokens=8).tokens
    assert whole is not None
    assert cut is not None
    assert np.flatnonzero(whole.targets).tolist() == [1, 5, 10, 11]  # no token precedes the first one
    assert np.flatnonzero(cut.targets).tolist() == [1, 5]
    assert tokenise_one({"text": "lives", "targets": [[1, 90]]}).skipped == 1


def test_rendered_text_gets_no_special_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    (plain, rendered) = tokenise(
        [parse_line(b'{"text": "lives"}'), parse_line(b'{"text": "lives", "rendered": true}')],
        tokenizer,
        DataConfig(data_path="-"),
    )
    assert plain.tokens is not None
    assert rendered.tokens is not None
    assert plain.tokens.ids.tolist() == [1, *rendered.tokens.ids.tolist(), EOS]


def test_truncation_cuts_the_right_end() -> None:
    record = tokenise_one(
        {"main": {"input_ids": list(range(3, 20))}, "branches": [{"input_ids": list(range(30, 50))}]},
        max_branch_tokens=8,
    )
    assert record.tokens is not None
    assert record.tokens.ids.tolist() == [*range(3, 11), *range(30, 38)]
    assert (record.truncated, record.skipped) == (2, 0)


def cut(value: object, **settings: object) -> tuple[list[list[int]], list[list[int]], int, int]:
    """The ids of main and branches, the target ids of each branch, the numbers of cut and skipped texts."""
    record = tokenise_one(value, max_branch_tokens=8, **settings)
    if record.tokens is None:
        return [], [], record.truncated, record.skipped
    masks = np.split(record.tokens.targets, np.cumsum(record.tokens.lengths)[:-1])
    parts = record.tokens.split()
    targets = [np.array(ids)[mask].tolist() for ids, mask in zip(parts[1:], masks[1:], strict=True)]
    return parts, targets, record.truncated, record.skipped


LONG_MAIN, LONG = list(range(3, 20)), list(range(30, 50))


@pytest.mark.parametrize(
    ("branch", "settings", "kept", "targets"),
    [
        ({"answer_offset": 15}, {"truncate_side": "left"}, range(42, 50), range(45, 50)),
        ({"answer_offset": 4}, {"truncate_side": "left"}, range(42, 50), range(43, 50)),
        ({"targets": [[2, 13], [16, 18]]}, {"truncate_side": "left"}, range(42, 50), [46, 47]),
        ({"answer_offset": 4}, {"truncate_side": "right"}, range(30, 38), range(34, 38)),
        ({"answer_offset": 13}, {"overlong": "keep_answer"}, range(42, 50), range(43, 50)),
        ({"targets": [[14, 15], [17, 18]]}, {"overlong": "keep_answer"}, range(42, 50), [44, 47]),
    ],
)
def test_targets_move_with_the_cut(
    branch: dict[str, object], settings: dict[str, object], kept: Iterable[int], targets: Iterable[int]
) -> None:
    value = {"main": {"input_ids": [3]}, "branches": [{"input_ids": LONG, **branch}, {"input_ids": [5, 6]}]}
    assert cut(value, **settings) == ([[3], [*kept], [5, 6]], [[*targets], [6]], 1, 0)


@pytest.mark.parametrize("offset", [0, 1, 12])
def test_a_branch_whose_answer_does_not_fit_after_a_prompt_is_skipped(offset: int) -> None:
    value = {"branches": [{"input_ids": LONG, "answer_offset": offset}]}
    assert cut(value, overlong="keep_answer") == ([], [], 0, 1)


@pytest.mark.parametrize("overlong", ["truncate", "keep_answer"])
def test_main_is_cut_at_the_side_that_is_set(overlong: str) -> None:
    value = {"main": {"input_ids": LONG_MAIN}, "branches": [{"input_ids": [5, 6]}]}
    assert cut(value, overlong=overlong)[0][0] == LONG_MAIN[:8]
    assert cut(value, overlong=overlong, truncate_side="left")[0][0] == LONG_MAIN[-8:]


def test_the_left_cut_keeps_the_begin_token_and_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    bos = TOKENIZER.bos_token_id
    monkeypatch.setattr("parallelmind.data.tokenise.bos_ids", lambda tokenizer: [bos])
    value = {"prompt": "the passage " * 9, "completion": "x"}
    (_, branch), targets, *_ = cut(value, overlong="keep_answer")
    assert (branch[0], branch[-2:], targets, len(branch)) == (bos, targets[0], [branch[-2:]], 8)
    assert branch[-1] == EOS
    (main, _), *_ = cut({"main": "the passage " * 9, "text": "who"}, truncate_side="left")
    assert main == [bos, *encode_text(TOKENIZER, "the passage " * 9, first=False)[-7:]]


def test_overlong_branches_are_skipped_on_request() -> None:
    branches = [{"input_ids": list(range(3, 20))}, {"input_ids": [3, 4]}]
    record = tokenise_one({"branches": branches}, max_branch_tokens=8, overlong="skip")
    assert record.tokens is not None
    assert (record.tokens.branches, record.truncated, record.skipped) == (1, 0, 1)
    main = {"main": {"input_ids": list(range(3, 20))}, "branches": branches}
    assert tokenise_one(main, max_branch_tokens=8, overlong="skip") == TokenisedRecord(None, False, 0, 2)


@pytest.mark.parametrize("branch", [{"input_ids": [5]}, {"input_ids": [5, 6], "answer_offset": 2}])
def test_a_branch_without_a_target_is_skipped(branch: object) -> None:
    assert tokenise_one({"branches": [branch]}) == TokenisedRecord(None, False, 0, 1)


def test_a_target_lost_to_truncation_is_skipped_not_truncated() -> None:
    assert tokenise_one(
        {"input_ids": list(range(3, 20)), "answer_offset": 12}, max_branch_tokens=8
    ) == TokenisedRecord(None, True, 0, 1)


def test_a_branch_that_does_not_fit_beside_main_is_skipped() -> None:
    value = {"main": {"input_ids": [3] * 6}, "branches": [{"input_ids": [4] * 5}, {"input_ids": [5] * 4}]}
    record = tokenise_one(value, max_sample_tokens=10)
    assert record.tokens is not None
    assert (record.tokens.lengths.tolist(), record.skipped) == ([6, 4], 1)


def test_records_tokenised_together_equal_records_tokenised_alone() -> None:
    values = [
        {
            "main": "passage",
            "branches": [{"prompt": "", "completion": "lives"}, "who", {"input_ids": [5, 6]}],
        },
        {"text": "lives"},
        {"main": {"input_ids": [7, 8]}, "branches": [{"prompt": "who", "completion": " lives"}]},
        {"main": {"text": "in"}, "branches": ["x"]},
    ]
    config = DataConfig(data_path="-")
    together = tokenise([parse_line(json.dumps(value).encode()) for value in values], TOKENIZER, config)
    for record, value in zip(together, values, strict=True):
        alone = tokenise_one(value).tokens
        assert record.tokens is not None
        assert alone is not None
        assert record.tokens.ids.tolist() == alone.ids.tolist()
        assert record.tokens.lengths.tolist() == alone.lengths.tolist()
        assert record.tokens.targets.tolist() == alone.targets.tolist()


def segments_of(tokens: Tokens | None) -> list[list[int]]:
    assert tokens is not None
    return tokens.split()


@pytest.mark.parametrize("main", ["", "the passage"])
def test_only_main_or_the_first_branches_open_a_sample(main: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    pair = {"prompt": "who ", "completion": "lives"}
    value = {
        "main": main,
        "branches": [{**pair, "branches": ["in", pair], "reduce": pair}, "where"],
        "reduce": {"text": "works", "targets": []},
    }
    (record,) = tokenise(
        [parse_line(json.dumps(value).encode())], tokenizer, DataConfig(data_path="-", overlong="skip")
    )
    got = segments_of(record.tokens)
    plain = [encode_text(TOKENIZER, text, first=False) for text in ("in", "where", "works")]
    two = encode_text(TOKENIZER, "who ", first=False) + encode_text(TOKENIZER, "lives", first=False)
    bos = [] if main else [1]
    assert got == [
        [1, *encode_text(TOKENIZER, main, first=False)] if main else [],
        [*bos, *two, EOS],
        [*plain[0], EOS],
        [*two, EOS],
        [*two, EOS],
        [*bos, *plain[1], EOS],
    ]  # nothing reads the reduce, which has no target
    assert (record.truncated, record.skipped) == (0, 1)


DOCUMENTS = {
    "branches": [
        {"input_ids": [5, 6, 7], "targets": []},
        {"input_ids": [8] * 6, "targets": []},
        {"input_ids": [9, 10, 11]},
    ],
    "reduce": {"input_ids": [12, 13, 14], "answer_offset": 1},
}


def test_a_text_without_a_target_is_kept_for_what_reads_it() -> None:
    record = tokenise_one(DOCUMENTS)
    assert segments_of(record.tokens) == [[], [5, 6, 7], [8] * 6, [9, 10, 11], [12, 13, 14]]
    assert record.tokens is not None
    assert record.tokens.ids[record.tokens.targets].tolist() == [10, 11, 13, 14]
    assert (record.truncated, record.skipped) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "left", "truncated"),
    [
        ({"max_sample_tokens": 15}, [[], [5, 6, 7], [8] * 6, [9, 10, 11], [12, 13, 14]], 0),
        ({"max_sample_tokens": 14}, [[], [9, 10, 11]], 0),
        ({"max_branch_tokens": 4, "overlong": "skip"}, [[], [9, 10, 11]], 0),
        ({"max_branch_tokens": 4}, [[], [5, 6, 7], [8] * 4, [9, 10, 11], [12, 13, 14]], 1),
        ({"max_branch_tokens": 2}, [[], [5, 6], [8, 8], [9, 10], [12, 13]], 4),
        ({"max_branch_tokens": 2, "overlong": "skip"}, None, 0),
    ],
)
def test_a_reduce_is_kept_with_all_that_it_reads_or_not_at_all(
    settings: dict[str, object], left: list[list[int]] | None, truncated: int
) -> None:
    record = tokenise_one(DOCUMENTS, **settings)
    assert (record.tokens and record.tokens.split()) == left
    assert (record.truncated, record.skipped) == (truncated, 4 - (len(left) - 1 if left else 0))


def test_a_text_that_gives_no_token_takes_along_what_reads_it() -> None:
    value = {
        "main": {"input_ids": [5]},
        "branches": ["where", {"text": "x", "targets": [], "rendered": True}],
        "reduce": "who",
    }
    record = parse_line(json.dumps(value).encode())
    (whole,) = tokenise([record], TOKENIZER, DataConfig(data_path="-"))
    assert len(segments_of(whole.tokens)) == 4
    silent = tiny_tokenizer()
    silent.backend_tokenizer.normalizer = Replace("x", "")
    (cut_off,) = tokenise([record], silent, DataConfig(data_path="-"))
    assert len(segments_of(cut_off.tokens)) == 2
    assert cut_off.skipped == 2


def test_a_text_whose_targets_end_after_it_takes_along_what_reads_it() -> None:
    value = {"branches": [" who", {"text": " where", "targets": [[1, 90]]}], "reduce": " works"}
    record = tokenise_one(value)
    assert segments_of(record.tokens) == segments_of(tokenise_one({"branches": [" who"]}).tokens)
    assert record.skipped == 2


def test_keep_answer_cuts_a_text_without_a_target_as_it_cuts_main() -> None:
    ids = list(range(30, 50))
    value = {"branches": [{"input_ids": ids, "targets": []}], "reduce": {"input_ids": [5, 6]}}
    for side, kept in (("right", ids[:8]), ("left", ids[-8:])):
        record = tokenise_one(value, max_branch_tokens=8, overlong="keep_answer", truncate_side=side)
        assert segments_of(record.tokens)[1] == kept


def as_value(segment: Segment, is_main: bool = True) -> dict[str, object]:
    """The record, or the segment in it, of a segment of `reference`."""
    own: dict[str, object] = {"input_ids": segment["tokens"]}
    value = {"main": own} if is_main else {**own, "answer_offset": segment["offset"]}
    if "branches" in segment:
        value["branches"] = [as_value(branch, is_main=False) for branch in segment["branches"]]
    if "reduce" in segment:
        value["reduce"] = as_value(segment["reduce"], is_main=False)
    return value


@given(
    root=TREES,
    max_branch_tokens=st.integers(2, 6),
    max_sample_tokens=st.integers(4, 40),
    overlong=st.sampled_from(["truncate", "skip"]),
)
def test_limits_keep_what_has_a_target_and_all_that_it_reads(
    root: Segment, max_branch_tokens: int, max_sample_tokens: int, overlong: str
) -> None:
    record = tokenise_one(
        as_value(root),
        max_branch_tokens=max_branch_tokens,
        max_sample_tokens=max_sample_tokens,
        overlong=overlong,
    )
    reference_tree(root, RopeConfig())
    segments = list(walk(root))
    reads = [{*segment["path"], *segment["joined"], segment["number"]} for segment in segments]
    texts = [segment["tokens"][:max_branch_tokens] for segment in segments]
    is_cut = [len(segment["tokens"]) > max_branch_tokens for segment in segments]
    kept = {0}
    for segment, read in zip(segments[1:], reads[1:], strict=True):
        fits = sum(len(texts[number]) for number in read) <= max_sample_tokens
        is_whole = overlong == "truncate" or not any(is_cut[number] for number in read)
        if fits and is_whole and len(texts[segment["number"]]) > max(segment["offset"], 1):
            kept |= read
    if kept == {0}:
        assert record.tokens is None
        return
    tokens = record.tokens
    assert segments_of(tokens) == [texts[number] for number in sorted(kept)]
    assert tokens is not None
    expected = shape_of(root).take(np.array(sorted(kept)))
    assert tokens.tree.parents.tolist() == expected.parents.tolist()
    assert tokens.tree.is_reduce.tolist() == expected.is_reduce.tolist()
    assert record.truncated == sum(is_cut[number] for number in kept)
    assert record.skipped == len(segments) - len(kept)
