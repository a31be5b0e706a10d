"""Token ids of records, within the limits."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_tokenizer

from parallelmind.config import DataConfig
from parallelmind.data.encode import encode_text
from parallelmind.data.records import parse_line
from parallelmind.data.tokenise import Tokenised, tokenise

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id


def run(value: object, **settings: object) -> Tokenised:
    config = DataConfig.model_validate({"data_path": "-", **settings})
    (done,) = tokenise([parse_line(json.dumps(value).encode())], TOKENIZER, config)
    return done


def test_the_prompt_is_what_decoding_reads_and_the_completion_ends() -> None:
    tokens = run({"main": "passage", "branches": [{"prompt": "who ", "completion": "lives"}]}).tokens
    assert tokens is not None
    main = encode_text(TOKENIZER, "passage", first=True)
    prompt = encode_text(TOKENIZER, "who ", first=False)
    completion = encode_text(TOKENIZER, "lives", first=False)
    assert tokens.ids.tolist() == [*main, *prompt, *completion, EOS]
    assert tokens.answer_offsets.tolist() == [len(prompt)]


def test_text_ends_with_eos_and_ids_stay_as_they_are() -> None:
    text = run({"text": "lives"}).tokens
    ids = run({"input_ids": [5, 6, 7], "answer_offset": 2}).tokens
    assert text is not None
    assert ids is not None
    assert text.ids.tolist() == [*encode_text(TOKENIZER, "lives", first=True), EOS]
    assert (ids.ids.tolist(), ids.answer_offsets.tolist()) == ([5, 6, 7], [2])


def test_truncation_cuts_the_right_end() -> None:
    done = run(
        {"main": {"input_ids": list(range(3, 20))}, "branches": [{"input_ids": list(range(30, 50))}]},
        max_branch_tokens=8,
    )
    assert done.tokens is not None
    assert done.tokens.ids.tolist() == [*range(3, 11), *range(30, 38)]
    assert (done.truncated, done.skipped) == (2, 0)


def test_overlong_is_skipped_when_asked() -> None:
    branches = [{"input_ids": list(range(3, 20))}, {"input_ids": [3, 4]}]
    done = run({"branches": branches}, max_branch_tokens=8, overlong="skip")
    assert done.tokens is not None
    assert (done.tokens.branches, done.truncated, done.skipped) == (1, 0, 1)
    main = {"main": {"input_ids": list(range(3, 20))}, "branches": branches}
    assert run(main, max_branch_tokens=8, overlong="skip") == Tokenised(None, 0, 2)


@pytest.mark.parametrize("branch", [{"input_ids": [5]}, {"input_ids": [5, 6], "answer_offset": 2}])
def test_a_branch_without_a_target_is_skipped(branch: object) -> None:
    assert run({"branches": [branch]}) == Tokenised(None, 0, 1)


def test_a_target_lost_to_truncation_is_skipped_not_truncated() -> None:
    assert run({"input_ids": list(range(3, 20)), "answer_offset": 12}, max_branch_tokens=8) == Tokenised(
        None, 0, 1
    )


def test_a_branch_that_does_not_fit_beside_main_is_skipped() -> None:
    value = {"main": {"input_ids": [3] * 6}, "branches": [{"input_ids": [4] * 5}, {"input_ids": [5] * 4}]}
    done = run(value, max_sample_tokens=10)
    assert done.tokens is not None
    assert (done.tokens.lengths.tolist(), done.skipped) == ([6, 4], 1)


def test_many_records_are_what_each_is_alone() -> None:
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
    for found, value in zip(together, values, strict=True):
        alone = run(value).tokens
        assert found.tokens is not None
        assert alone is not None
        assert found.tokens.ids.tolist() == alone.ids.tolist()
        assert found.tokens.lengths.tolist() == alone.lengths.tolist()
        assert found.tokens.answer_offsets.tolist() == alone.answer_offsets.tolist()
