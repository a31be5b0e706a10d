"""Tokenised records keep to the length limits, and to what decoding reads."""

from __future__ import annotations

import json

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
