"""Trees and packed rows: the same losses and gradients in every attention, and as separate rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from families import FAMILIES, VARIANTS, model_class, variant
from flexing import flex_always_chosen, flex_on_cpu

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.evaluation.probes import LawViolationError, check_close, patched
from parallelmind.evaluation.tree_law import check_tree_gradients, law_tree
from parallelmind.layout import Batch, Tokens
from parallelmind.model import mask
from parallelmind.model.adapter import add_lora
from parallelmind.model.attention import BLOCKS, FLEX, choose_attention
from parallelmind.model.inputs import to_tensors
from parallelmind.model.patch import patch
from parallelmind.training.loss import TargetLoss

SAMPLES = [
    law_tree(),
    Tokens.of([5, 6, 7], [[8, 9, 10, 11], [12, 13]]),
    Tokens.of([], [[20, 21, 22], [23, 24, 25, 26, 27], [28, 29]]),
]
CONFIGS = [
    RopeConfig(),
    RopeConfig(visibility="isolated", align_to="right"),
    RopeConfig(positions="flat", pairs="low", branch_angle="alone", sibling_penalty=0),
]

names = pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
configs = pytest.mark.parametrize("config", CONFIGS, ids=["default", "isolated", "published"])


def loss_and_gradients(
    model: torch.nn.Module, batches: Sequence[Batch], config: RopeConfig, dtype: torch.dtype = torch.float32
) -> tuple[float, torch.Tensor]:
    """The loss summed over all targets, and all gradients, flattened."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = TargetLoss(model, config.visibility, dtype)(to_tensors(batch))
        loss.backward()
        total += loss.item()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return total, torch.cat(gradients)


def packed(config: RopeConfig) -> Batch:
    return make_batch(SAMPLES, config, pad_id=0, packing=True)


def attention_of(model: torch.nn.Module) -> str:
    return choose_attention(model, 64, torch.float32, is_flat=False)


@names
@configs
def test_a_packed_row_has_the_losses_of_its_samples(name, config):
    model = variant(name, "sdpa" if model_class(name)._supports_sdpa else "eager")
    with patched(model, config):
        loss, gradients = loss_and_gradients(model, [packed(config)], config)
        alone = [make_batch([sample], config, pad_id=0) for sample in SAMPLES]
        expected, expected_gradients = loss_and_gradients(model, alone, config)
    assert loss == pytest.approx(expected, rel=1e-5)
    check_close(gradients, expected_gradients, "gradients of a packed row and of its samples", 1e-3)


@names
@configs
def test_every_attention_gives_the_same_gradients(name, config):
    batches = [packed(config), make_batch(SAMPLES, config, pad_id=0)]
    results = {}
    model = variant(name)
    with patched(model, config):
        results["eager"] = loss_and_gradients(model, batches, config)
    if model_class(name)._supports_sdpa:
        model = variant(name, "sdpa")
        with patched(model, config):
            results[attention_of(model)] = loss_and_gradients(model, batches, config)
            with flex_on_cpu(), flex_always_chosen():
                results[attention_of(model)] = loss_and_gradients(model, batches, config)
    for loss, gradients in results.values():
        assert loss == pytest.approx(results["eager"][0], rel=1e-5)
        check_close(gradients, results["eager"][1], "gradients of two attentions", 1e-3)
    assert name != "shared" or set(results) == {"eager", BLOCKS, FLEX}


@pytest.mark.parametrize("name", FAMILIES)
@configs
def test_checkpointing_changes_no_gradient(name, config):
    model = variant(name, "sdpa" if model_class(name)._supports_sdpa else "eager")
    patch(model, config)
    adapted = add_lora(model, LoraConfig(lora_rank=2), seed=0).train()
    for weight_name, weight in adapted.named_parameters():
        if "lora_B" in weight_name:
            torch.nn.init.constant_(weight, 0.05)
    _, expected = loss_and_gradients(adapted, [packed(config)], config)
    model.activation_checkpointing_enable()
    _, gradients = loss_and_gradients(adapted, [packed(config)], config)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_close_to_float32(name):
    config = RopeConfig()
    model = variant(name, "sdpa" if model_class(name)._supports_sdpa else "eager")
    with patched(model, config):
        expected, _ = loss_and_gradients(model, [packed(config)], config)
        loss, _ = loss_and_gradients(model, [packed(config)], config, torch.bfloat16)
    assert loss == pytest.approx(expected, rel=0.05)


def test_blocks_of_queries_are_shorter_than_the_row(monkeypatch):
    """Several blocks in a row, with keys that lie side by side and keys that do not."""
    config = RopeConfig(visibility="isolated")
    batch = packed(config)
    model = variant("shared", "sdpa")
    with patched(model, config):
        expected = loss_and_gradients(model, [batch], config)
        for size in (1, 7, 32):
            monkeypatch.setattr(mask, "QUERIES", size)
            loss, gradients = loss_and_gradients(model, [batch], config)
            assert loss == pytest.approx(expected[0], rel=1e-5)
            check_close(gradients, expected[1], "gradients by blocks of another size", 1e-4)


@pytest.mark.parametrize(
    "scores",
    [(-np.inf, 0, 0, 0), (-np.inf, -np.inf, 0, -np.inf), (-np.inf, 0, -np.inf, -np.inf)],
    ids=["siblings are visible", "the path is not", "joined segments are not"],
)
def test_a_wrong_table_breaks_a_law(monkeypatch, scores):
    """scores: of unrelated texts, of the path, of joined segments and of siblings."""
    monkeypatch.setattr(mask, "relation_scores", lambda *_: np.array(scores, np.float32))
    with pytest.raises(LawViolationError, match="separate rows"):
        check_tree_gradients(variant("shared"))


def test_only_trees_and_packed_rows_are_computed_by_blocks():
    model = variant("shared", "sdpa")
    with patched(model, RopeConfig()):
        assert choose_attention(model, 4096, torch.float32) == "sdpa"
        assert attention_of(model) == BLOCKS
        model.model.layers[0].self_attn.attention_dropout = 0.1
        assert attention_of(model) == "sdpa"
