"""Training on an accelerator waits for it when a line is logged and mixes no tensors of different devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import variant
from looping import Recorder, config, training_inputs

from parallelmind.config import RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.evaluation.device_waits import count_waits
from parallelmind.evaluation.tree_law import law_tree
from parallelmind.layout import Tokens
from parallelmind.model.adapter import add_lora
from parallelmind.model.inputs import to_tensors
from parallelmind.model.mask import block_mask
from parallelmind.model.patch import patch
from parallelmind.training.loop import Trainer
from parallelmind.training.step import evaluate
from parallelmind.visibility import AttentionWindow

NAMES = ("shared", "layer types", "complex", "windows beside full attention", "windows in every layer")


def trainer_on_meta(name: str, **fields: Any) -> Trainer:
    settings = config(log_every=3, checkpoint_every=100, validate_every=100, **fields)
    model = variant(name, "sdpa")
    patch(model, settings.rope)
    adapted = add_lora(model, settings.lora, seed=0).to("meta")
    return Trainer(training_inputs(settings, Recorder(), adapted), None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fields", [{}, {"visibility": "isolated"}], ids=str)
def test_a_logged_step_waits_once_and_others_never(name: str, fields: dict[str, Any]) -> None:
    trainer = trainer_on_meta(name, **fields)
    stream = iter(trainer.inputs.batches(0, 0))
    for expected in ([], [], ["tolist"]):
        with count_waits() as waits:
            assert trainer.train_step(stream)
        assert waits == expected


def test_a_validation_waits_once() -> None:
    trainer = trainer_on_meta("shared")
    with count_waits() as waits:
        evaluate(trainer.loss, list(trainer.inputs.batches(0, 0)))
    assert waits == ["item"]


@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
def test_a_block_mask_is_made_without_waiting(visibility: Any) -> None:
    samples = [law_tree(), Tokens.of([5] * 200, [[6] * 90, [7] * 30])]
    with count_waits() as waits:
        placement = to_tensors(make_batch(samples, RopeConfig(visibility=visibility), 0), "meta").placement
        block_mask(placement, visibility, AttentionWindow(window=64))
    assert waits == []


def test_waits_are_counted() -> None:
    host = torch.ones(3)
    with count_waits() as waits:
        device = host.to("meta")
        host.to("meta", non_blocking=True)
        device.sum().item()
        bool(device[0])
        device.copy_(host)
    assert waits == ["copy", "item", "__bool__", "copy"]
