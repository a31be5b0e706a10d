"""The check of an adapter compares cached decoding with one forward pass, on any tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from engines import COLUMNAR, ISOLATED
from tiny import tiny_llama, tiny_tokenizer

from parallelmind.config import RopeConfig
from parallelmind.engine.decoding_check import decoding_distance
from parallelmind.engine.model_runner import ModelRunner
from parallelmind.errors import UserError
from parallelmind.model.patch import patch
from serving.engine.adapter_check import check_adapter


def patched_model(config: RopeConfig) -> Any:
    model = tiny_llama()
    patch(model, config)
    return model


def scale_decoded_logits(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Change what cached decoding computes, as a wrong cache would."""
    call = ModelRunner.__call__
    monkeypatch.setattr(ModelRunner, "__call__", lambda *args: call(*args) * factor)


@pytest.mark.parametrize("config", [COLUMNAR, ISOLATED], ids=["columnar", "isolated"])
def test_a_model_that_decodes_as_trained_passes(config: RopeConfig) -> None:
    check_adapter(patched_model(config), tiny_tokenizer(), config, "float32")


@pytest.mark.parametrize(
    ("dtype", "factor", "passes"),
    [
        ("float32", 1.01, False),
        ("bfloat16", 1.01, True),
        ("bfloat16", 1.2, False),
        ("float32", float("nan"), False),
    ],
)
def test_the_tolerance_depends_on_the_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: Any, factor: float, passes: bool
) -> None:
    model = patched_model(ISOLATED)
    scale_decoded_logits(monkeypatch, factor)
    if passes:
        check_adapter(model, tiny_tokenizer(), ISOLATED, dtype)
        return
    with pytest.raises(UserError, match=r"model: the adapter is refused: .*; train it") as error:
        check_adapter(model, tiny_tokenizer(), ISOLATED, dtype)
    assert "\n" not in str(error.value)


def test_a_forward_pass_with_other_visibility_is_noticed() -> None:
    assert decoding_distance(patched_model(ISOLATED), tiny_tokenizer(), COLUMNAR) > 1e-2
