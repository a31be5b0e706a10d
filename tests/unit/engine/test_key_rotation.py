"""Rotated states are those that a forward pass computes at another time, or the model is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import FAMILIES, VARIANTS, variant
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.engine.key_rotation import KeyRotation
from parallelmind.engine.kv_cache import PagedKVCache
from parallelmind.evaluation.probes import patched
from parallelmind.evaluation.tiny_models import tiny_model

LEFT_ALONE = ("complex", "dynamic", "longrope")  # chunks of attention, and frequencies that follow the length
IDS = [5, 17, 6, 90, 33]


@torch.inference_mode()
def states_at(model: PreTrainedModel, start: int) -> dict[str, Tensor]:
    """The states of a text that starts at this time."""
    cache, slots = PagedKVCache(), torch.arange(len(IDS))
    cache.reserve(len(IDS))
    cache.set_step(slots, slots)
    model(torch.tensor([IDS]), position_ids=slots[None] + start, past_key_values=cache, use_cache=True)
    return cache.read_slots(np.arange(len(IDS)))


def rotated(rotation: KeyRotation, states: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    change = rotation.by(np.full(len(IDS), steps))
    return {name: change(name, rows.clone()) for name, rows in states.items()}


def config_of(ratio: float, angle: str = "alone") -> RopeConfig:
    return RopeConfig(rope_2d_ratio=ratio, branch_angle=angle, visibility="isolated", positions="time")


@pytest.mark.parametrize(("ratio", "angle"), [(0.0, "alone"), (0.5, "alone"), (0.5, "added")])
@pytest.mark.parametrize("family", [name for name in [*FAMILIES, *VARIANTS] if name not in LEFT_ALONE])
def test_rotated_states_are_those_of_another_time(family: str, ratio: float, angle: str) -> None:
    model = variant(family)
    with patched(model, config_of(ratio, angle)):
        rotation = KeyRotation.find(model)
        assert rotation is not None
        early, late = states_at(model, 3), states_at(model, 43)
        # Branch pairs alone do not turn; the call has no branches, so that their coordinate stays 0.
        for name, rows in rotated(rotation, early, 40).items():
            torch.testing.assert_close(rows, late[name], atol=2e-4, rtol=2e-4, msg=f"{family} {name}")
        for name, rows in rotated(rotation, late, -40).items():
            torch.testing.assert_close(rows, early[name], atol=2e-4, rtol=2e-4, msg=f"{family} {name}")


@pytest.mark.parametrize("steps", [4000, 100_000])
def test_long_distances_are_as_exact_as_the_model(steps: int) -> None:
    """Positions and frequencies are float32 in a model, whose angles are exact to 4e-3 at 100,000."""
    model = variant("shared")
    rotation = KeyRotation.find(model)
    assert rotation is not None
    early, late = states_at(model, 0), states_at(model, steps)
    for name, rows in rotated(rotation, early, steps).items():
        largest = late[name].abs().max()
        torch.testing.assert_close(rows, late[name], atol=float(8e-8 * steps * largest), rtol=0.0)


@pytest.mark.parametrize("family", LEFT_ALONE)
def test_a_model_whose_states_depend_on_more_is_left_alone(family: str) -> None:
    model = variant(family)
    with patched(model, config_of(0.5)):
        assert KeyRotation.find(model) is None


def test_scores_that_grow_with_time_are_left_alone() -> None:
    model = tiny_model("ministral3", "eager")
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.1
    assert KeyRotation.find(model) is None
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.0
    assert KeyRotation.find(model) is not None


def test_keys_that_are_scaled_after_the_rotation_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = variant("shared")
    written = PagedKVCache.update

    def update(self: PagedKVCache, keys: Tensor, *args: object) -> tuple[Tensor, Tensor]:
        return written(self, keys * torch.linspace(0.5, 2, keys.shape[-1]), *args)  # type: ignore[arg-type]

    monkeypatch.setattr(PagedKVCache, "update", update)
    assert KeyRotation.find(model) is None


def test_the_rotation_is_found_in_bfloat16_and_has_its_precision() -> None:
    model = variant("shared")
    rotation = KeyRotation.find(model)
    assert rotation is not None
    rounded = KeyRotation.find(model.bfloat16())
    assert rounded is not None
    for name, expected in rotation.by_name.items():
        found = rounded.by_name[name]
        assert (found.first, found.second) == (expected.first, expected.second), name
    states = {"0.keys": torch.randn(len(IDS), 2, 16).bfloat16()}
    exact = rotated(rotation, {"0.keys": states["0.keys"].float()}, 1000)["0.keys"]
    found_keys = rotated(rotation, states, 1000)["0.keys"]
    assert found_keys.dtype == torch.bfloat16
    torch.testing.assert_close(found_keys.float(), exact, atol=0.0, rtol=2**-8)


def test_every_token_is_rotated_by_its_own_number_of_steps() -> None:
    model = variant("shared").train()
    rotation = KeyRotation.find(model)
    assert model.training
    assert rotation is not None
    keys, steps = torch.randn(3, 2, 16), np.array([0, 7, -50])
    together = rotation.by(steps)("0.keys", keys.clone())
    for row, count in enumerate(steps.tolist()):
        (alone,) = rotation.by(np.array([count]))("0.keys", keys[row : row + 1].clone())
        assert torch.equal(together[row], alone)
    assert torch.equal(together[0], keys[0])
