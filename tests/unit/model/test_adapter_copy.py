"""A model that got its adapters from copies computes what one computes that read them itself."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import ISOLATED, saved_adapters
from peft import PeftModel
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor

from parallelmind.model.adapter import attach, read_saved
from parallelmind.model.adapter_copy import is_movable, move_adapter, shared_copy
from parallelmind.model.patch import patch
from parallelmind.model.structure import causal_lm

NAMES = ("v0", "v1", "v2")


def patched() -> Any:
    model = tiny_llama()
    patch(model, ISOLATED)
    return model.eval()


@torch.no_grad()
def logits(model: Any, active: str | None = None) -> Tensor:
    if active is not None:
        model.set_adapter(active)
    result: Tensor = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    first, second = saved_adapters(tmp_path_factory.mktemp("adapters"))
    return [first, second, first]


def adapted_both_ways(folders: list[Path], targets: list[set[str]]) -> tuple[PeftModel, PeftModel]:
    """The model that moved adapters, and the one that attached them. targets: layers of each adapter."""
    model, expected = patched(), patched()
    for name, folder, layers in zip(NAMES, folders, targets, strict=True):
        saved, own = (read_saved(each, tiny_tokenizer(), folder) for each in (model, expected))
        for each in (saved, own):
            each.settings.target_modules = layers
            kept = {key: value for key, value in each.weights.items() if key.split(".")[-3] in layers}
            object.__setattr__(each, "weights", kept)
        adapted = attach(shared_copy(model), saved, name).eval()
        assert is_movable(adapted)
        before = logits(adapted)
        model = move_adapter(adapted, model, name)
        assert model is not None
        expected = attach(expected, own, name).eval()
        assert torch.equal(logits(model, name), before)
    return model, expected


@pytest.mark.parametrize(
    "targets",
    [
        [{"q_proj", "v_proj"}] * 3,
        [{"q_proj"}, {"q_proj", "v_proj"}, {"v_proj"}],
        [{"q_proj", "v_proj"}, {"q_proj"}, {"v_proj"}],
    ],
    ids=["the same layers", "more layers", "fewer layers"],
)
def test_moved_adapters_compute_what_attached_ones_do(folders: list[Path], targets: list[set[str]]) -> None:
    model, expected = adapted_both_ways(folders, targets)
    for name in NAMES:
        assert torch.equal(logits(model, name), logits(expected, name))
    assert len({str(logits(model, name)) for name in NAMES[:2]}) == 2
    with model.disable_adapter(), expected.disable_adapter():
        assert torch.equal(logits(model), logits(expected))
    for each in (model, expected):
        each.set_adapter("v0")
        each.delete_adapter("v1")
    assert torch.equal(logits(model, "v2"), logits(expected, "v2"))
    saved, expected_saved = model.state_dict(), expected.state_dict()
    assert saved.keys() == expected_saved.keys()
    assert causal_lm(model).peft_config.keys() == {"v0", "v2"}


def test_a_copy_has_the_models_weights_and_modules_of_its_own(folders: list[Path]) -> None:
    model = patched()
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = logits(model)
    adapted = attach(model, read_saved(model, tiny_tokenizer(), folders[0]), "v0").eval()
    copy = shared_copy(adapted)
    assert torch.equal(logits(copy), expected)
    assert len(calls) == 2  # a hook that belongs to no model is shared
    own, shared = dict(model.named_modules()), dict(copy.named_modules())
    assert not {id(module) for module in own.values()} & {id(module) for module in shared.values()}
    weights = {id(weight) for weight in model.parameters()}
    assert {id(weight) for weight in copy.parameters()} < weights


def test_the_hooks_of_the_patch_are_those_of_the_copy() -> None:
    copy = shared_copy(patched())
    bound = [hook.args[0] for hook in copy._forward_pre_hooks.values() if isinstance(hook, partial)]
    assert bound == [copy]
