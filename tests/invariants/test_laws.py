"""The laws of the patch for every family and variant, and that a broken mechanism breaks a law."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, VARIANTS, model_class, variant
from tiny import tiny_llama
from torch import nn

from parallelmind import visibility
from parallelmind.config import RopeConfig
from parallelmind.errors import UserError
from parallelmind.evaluation.laws import LAWS, check_cached_decoding
from parallelmind.evaluation.model_support import attention_implementations
from parallelmind.evaluation.probes import (
    BRANCHES,
    MAIN,
    LawViolationError,
    check_close,
    patched,
    sample_logits,
)
from parallelmind.evaluation.rope_configs import ALL_ROPE_CONFIGS
from parallelmind.evaluation.tiny_models import WINDOW
from parallelmind.model import mask, rope2d, rotary
from parallelmind.model.patch import patch, unpatch
from parallelmind.model.patch_state import rope_config
from parallelmind.model.rope2d import BRANCH, TIME
from parallelmind.model.support import assess

CASES = [
    (name, attention)
    for name in [*FAMILIES, *VARIANTS]
    for attention in attention_implementations(model_class(name))
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def model(request):
    return variant(*request.param)


@pytest.mark.parametrize("law", LAWS)
def test_law(model, law):
    LAWS[law](model)


@pytest.mark.parametrize(("name", "attention"), [case for case in CASES if case[0] in FAMILIES])
def test_cached_decoding_equals_one_full_forward_in_every_setting(name, attention):
    check_cached_decoding(
        variant(name, attention), [setting for setting in ALL_ROPE_CONFIGS for _ in ("bare", "main")]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_of_each_representative(family):
    assert assess(variant(family)).family == family


def test_time_positions_do_not_depend_on_the_number_of_siblings(model):
    with patched(model, RopeConfig(visibility="isolated", positions="time")) as config:
        one_branch, all_branches = sample_logits(model, config, BRANCHES[:1]), sample_logits(model, config)
    check_close(one_branch[1], all_branches[1], "a branch with and without siblings")


def test_a_patched_model_keeps_its_names():
    model = tiny_llama()
    patch(model, RopeConfig(rope_2d_ratio=1.0))
    assert type(model.model.rotary_emb).__name__ == "LlamaRotaryEmbedding"
    with pytest.raises(UserError, match="already patched"):
        patch(model, RopeConfig())
    unpatch(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    with pytest.raises(UserError, match="not patched"):
        rope_config(model)


def test_pos2d_without_a_mask_is_refused():
    model = tiny_llama()
    patch(model, RopeConfig())
    with pytest.raises(ValueError, match="attention_mask"):
        model(torch.tensor([[1, 2]]), pos2d=torch.zeros(1, 2, 2, dtype=torch.long))
    assert model(torch.tensor([[1, 2]])).logits.shape[1] == 2  # the failed call left nothing behind


def test_branch_coordinates_do_not_trigger_length_scaling():
    """A long text changes the frequencies of these models. A large branch coordinate must not."""
    for name in ("dynamic", "longrope"):
        model = variant(name)
        before = model.model.rotary_emb.inv_freq.clone()
        with patched(model, RopeConfig(branch_stride=1000)) as config:
            sample_logits(model, config)
        assert torch.equal(model.model.rotary_emb.inv_freq, before)
        model(torch.arange(600)[None] % 100)
        assert not torch.equal(model.model.rotary_emb.inv_freq, before)


# Each mechanism is broken once; a law must fail.


def broken(law: str, name: str) -> bool:
    try:
        LAWS[law](variant(name))
    except LawViolationError:
        return True
    return False


def test_a_wrong_column_map_breaks_a_law(monkeypatch):
    """One column of a pair follows the branch, the other follows time."""

    def mix(flat, branch, time, axes):
        first_half = torch.arange(len(axes)) < len(axes) // 2
        return rope2d.mix(flat, branch, time, torch.where(first_half & (axes == BRANCH), TIME, axes))

    monkeypatch.setattr(rotary, "mix", mix)
    assert broken("coordinate_shift", "shared")


@pytest.mark.parametrize(
    "name", ["windows in every layer", "windows beside full attention", "layer types", "complex"]
)
def test_a_missing_window_breaks_a_law(monkeypatch, name):
    monkeypatch.setattr(visibility.AttentionWindow, "within", lambda *args: None)
    assert broken("single_branch", name)


def test_a_window_in_storage_order_breaks_a_law(monkeypatch):
    def near(reach, q_time, k_time):
        storage_index = torch.arange(k_time.shape[-1])
        return storage_index[:, None] - storage_index < reach.window

    monkeypatch.setattr(visibility.AttentionWindow, "within", near)
    assert broken("isolated_branches", "windows in every layer")


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_a_length_trigger_that_sees_branches_breaks_a_law(monkeypatch, name):
    class UncheckedRotary(rotary.BranchRotary):
        """Passes all three coordinates through the length trigger."""

        def forward(self, x, position_ids, *args, **kwargs):
            coordinates = rotary.coordinates(position_ids, self.pos2d_angle)
            tables = (
                nn.Module.__getattribute__(self, "__class__")
                .__bases__[1]
                .forward(self, x, torch.cat(coordinates))
            )
            return tuple(rotary.mix(*table.chunk(3), self.pos2d_axes) for table in tables)

    monkeypatch.setattr(rotary, "BranchRotary", UncheckedRotary)
    assert broken("coordinate_shift", name)


def test_a_leak_between_branches_breaks_a_law(monkeypatch):
    monkeypatch.setattr(mask, "relation_scores", lambda visibility, penalty: np.array([-np.inf, 0, 0, 0]))
    assert broken("siblings", "shared")
    assert broken("isolated_branches", "shared")


def test_the_text_of_the_laws_is_longer_than_every_window():
    assert len(MAIN) + len(BRANCHES[1]) > 2 * WINDOW
