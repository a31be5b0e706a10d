"""Batches of `pm.tree_batch` in calls of patched and other models."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from adapting import patched_llama
from families import FAMILIES, VARIANTS, variant
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from transformers import BatchEncoding
from tree_losses import training_loss

import parallelmind as pm
from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.errors import UserError
from parallelmind.evaluation import tiny_models
from parallelmind.model.adapter import add_lora

TREES = [
    {
        "main": {"input_ids": [5, 6, 7]},
        "branches": [
            {
                "input_ids": [8, 9, 10],
                "branches": [{"input_ids": [11, 12, 13, 14]}, {"input_ids": [15, 16]}],
                "reduce": {"input_ids": [17, 18, 19, 20]},
            },
            {"input_ids": [21, 22, 23, 24, 25, 26], "targets": [[2, 3], [4, 6]]},
        ],
        "reduce": {"input_ids": [27, 28, 29], "answer_offset": 2},
    },
    {"main": {"input_ids": [30]}, "branches": [{"input_ids": [31, 32]}, {"input_ids": [33, 34, 35]}]},
    {"input_ids": [40, 41, 42, 43]},
]
CONFIG = RopeConfig()


def tree_batch(config: RopeConfig = CONFIG, packing: bool = False) -> BatchEncoding:
    return pm.tree_batch(tiny_models.tiny_tokenizer(), TREES, config, packing=packing)


def mean_target_loss(model: nn.Module, batch: BatchEncoding, config: RopeConfig = CONFIG) -> Tensor:
    """The loss of the project's own training, per target."""
    total, targets = training_loss(model, batch, config)
    assert targets == 13 + 3 + 3  # no first token of a segment is one
    return total / targets


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_the_loss_of_the_model_is_that_of_training(name: str, packing: bool) -> None:
    """Called by itself and by peft, which calls no hook of the model but that of its decoder."""
    model = variant(name)
    pm.patch(model, CONFIG)
    for called in (model, add_lora(model, LoraConfig(lora_rank=2), seed=0)):
        batch = tree_batch(packing=packing)
        assert len(batch["input_ids"]) == (1 if packing else len(TREES))
        with torch.no_grad():
            torch.testing.assert_close(
                called(**batch).loss, mean_target_loss(called, batch), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("config", [RopeConfig(visibility="isolated"), RopeConfig(positions="flat")])
def test_the_model_masks_as_its_own_settings_say(config: RopeConfig) -> None:
    model = patched_llama(config)
    batch = tree_batch(config)
    torch.testing.assert_close(model(**batch).loss, mean_target_loss(model, batch, config))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, gradients = patched_llama().train(), []
    for turn in range(2):
        if turn:
            model.activation_checkpointing_enable()
        model.zero_grad()
        model(**tree_batch()).loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_nothing_is_cached() -> None:
    assert patched_llama()(**tree_batch()).past_key_values is None


def test_a_batch_moves_and_is_sent_to_other_processes_like_any_other() -> None:
    model = patched_llama()
    expected = model(**tree_batch()).loss
    batch = tree_batch()
    by_hand = {name: value.to("cpu") for name, value in batch.items()}
    for moved in (batch.to("cpu"), by_hand, pickle.loads(pickle.dumps(batch))):
        assert torch.equal(model(**moved).loss, expected)


def test_some_rows_of_a_batch_are_a_batch() -> None:
    model = patched_llama()
    rows = {name: value[1:2] for name, value in tree_batch().items()}
    alone = pm.tree_batch(tiny_tokenizer(), TREES[1:2], CONFIG)
    torch.testing.assert_close(model(**rows).loss, model(**alone).loss)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gptj", "moshi", "gpt2", "jamba", "bart"])
def test_a_model_that_is_not_patched_raises_one_line(model_type: str, training: bool) -> None:
    """Whether or not it could be patched: no loss comes out."""
    model = tiny_models.tiny_model(model_type).train(training)
    with pytest.raises(UserError, match=r"^model: is not patched.* pos2d .*; call pm\.patch\(.*$"):
        model(**tree_batch())


def test_an_unpatched_model_has_no_settings_to_make_a_batch_with() -> None:
    with pytest.raises(UserError, match="model: is not patched"):
        pm.rope_config(tiny_llama())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relations": None}, "relations: is missing; pass everything"),
        ({"segment": None}, "segment: is missing; pass everything"),
        ({"pos2d": None}, "pos2d: is missing; pass everything"),
        ({"segment": None, "relations": None}, "attention_mask: pos2d needs the mask"),
        ({"relations": torch.zeros(9, 2, 2)}, "rows: pos2d=3 segment=3 relations=9: differ; take the same"),
        ({"attention_mask": torch.ones(3, 22)}, "attention_mask: the model makes it .* leave it out"),
    ],
)
def test_a_part_of_a_batch_is_refused(change: dict[str, Any], message: str) -> None:
    batch = {name: value for name, value in {**tree_batch(), **change}.items() if value is not None}
    model = patched_llama()
    with pytest.raises(UserError, match=message):
        model(**batch)
    assert model(**tree_batch()).loss > 0  # the failed call has left nothing behind


def test_a_batch_of_other_settings_is_refused() -> None:
    batch = tree_batch(RopeConfig(branch_stride=3))
    with pytest.raises(UserError, match="config: the batch has branch_stride=3, the model 16"):
        patched_llama()(**batch)
