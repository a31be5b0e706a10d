"""Tokenised records keep to the length limits, and to what decoding reads."""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pytest
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from parallelmind.config import DataConfig
from parallelmind.data.encode import encode_text
from parallelmind.data.records import parse_line
from parallelmind.data.tokenise import TokenisedRecord, tokenise

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
