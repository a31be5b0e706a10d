"""Records as batches for other training loops: tensors, labels, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer

import parallelmind as pm
from parallelmind.config import RopeConfig, TrainConfig
from parallelmind.errors import UserError

TOKENIZER = tiny_tokenizer()
CONFIG = RopeConfig()


def test_a_label_stands_one_place_to_the_right_of_the_token_that_predicts_it() -> None:
    record = {
        "main": {"input_ids": [5]},
        "branches": [{"input_ids": [6, 7, 8]}, {"input_ids": [16, 17]}],
        "reduce": {"input_ids": [26, 27]},
    }
    batch = pm.tree_batch(TOKENIZER, [record, {"input_ids": [9, 10]}], CONFIG)
    assert batch["input_ids"].tolist() == [[5, 6, 16, 7, 17, 8, 26, 27], [9, 10, 0, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [-100, -100, 7, 17, 8, -100, -100, 27],
        [-100, 10, -100, -100, -100, -100, -100, -100],
    ]
    assert batch["segment"][1].tolist() == [1, 1, -1, -1, -1, -1, -1, -1]
    assert batch["pos2d"][0, :, 1].tolist() == batch["position_ids"][0].tolist() == [0, 1, 1, 2, 2, 3, 4, 5]
    types = {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert types.pop("relations") == torch.int8
    assert set(types.values()) == {torch.int64}


def test_texts_of_any_length_are_kept_whole() -> None:
    long = {"main": "is " * 5000, "branches": [{"prompt": " who", "completion": " lives" * 2000}]}
    batch = pm.tree_batch(TOKENIZER, [long], CONFIG)
    ids = TOKENIZER("is " * 5000 + " who" + " lives" * 2000, add_special_tokens=False)["input_ids"]
    assert sorted(batch["input_ids"][0].tolist()) == sorted([*ids, TOKENIZER.eos_token_id])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "samples: holds no list of records; give a list of at least one"),
        ({"text": "a"}, "samples: holds no list of records"),
        (None, "samples: holds no list of records"),
        (["a"], r"samples\[0\]: is a JSON string, not an object"),
        ([{"text": "a b"}, {}], r"samples\[1\]: is empty; with a Trainer, set remove_unused_columns=False"),
        (
            [{"text": "a b"}, {"branches": [{"prompt": "a"}]}],
            r"samples\[1\]: branches\[0\] has no compl",
        ),
        ([{"input_ids": [4, 300]}], r"samples\[0\]: .*input_ids holds 300, and the tokenizer has 300 tokens"),
        (
            [{"text": "a b"}, {"branches": ["a b", {"text": "c", "answer_offset": 9}]}],
            r"samples\[1\]: 1 of 2 texts have no target.*; give them a completion",
        ),
        (
            [{"branches": [{"text": "a b", "targets": []}, "c d"], "reduce": {"text": "e", "targets": []}}],
            r"samples\[0\]: 2 of 3 texts have no target",
        ),
    ],
)
def test_bad_samples_are_named_in_one_line(samples: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}") as caught:
        pm.tree_batch(TOKENIZER, samples, CONFIG)
    assert "\n" not in str(caught.value)


def test_samples_may_come_from_an_iterator() -> None:
    record = {"branches": ["a b", "c"]}
    batch = pm.tree_batch(TOKENIZER, iter([record]), CONFIG)
    assert batch["input_ids"].tolist() == pm.tree_batch(TOKENIZER, [record], CONFIG)["input_ids"].tolist()


@pytest.mark.parametrize("config", [None, {}, TrainConfig(data_path="-")])
def test_a_config_of_a_wrong_type_is_refused(config: Any) -> None:
    with pytest.raises(UserError, match=f"^config: is {type(config).__name__}, not RopeConfig; pass"):
        pm.tree_batch(TOKENIZER, [{"text": "a"}], config)
