"""The GPU benchmark: its arithmetic, and small runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_decoding
from benchmarks.gpu import (
    SHAPES,
    Shape,
    Workload,
    build,
    measure,
    peak,
    qwen,
    random_batch,
    step_flops,
)
from parallelmind.model.base_model import build_meta_model
from parallelmind.model.inputs import to_tensors
from parallelmind.model.mask import AttentionBias
from parallelmind.model.structure import causal_lm, decoder
from parallelmind.training.loss import TargetLoss

TINY = Shape(qwen(300, 64, 128, 4, 4, 2, tied=True), checkpointing=False)
SMALL = Workload("columnar", 8, 4, rows=2)


@pytest.mark.parametrize("visibility", ["columnar", "isolated"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_small_run(device, visibility, checkpointing):
    speed = measure(
        build(replace(TINY, checkpointing=checkpointing), device), replace(SMALL, visibility=visibility)
    )
    assert speed.tokens > 0
    assert speed.flops > 1e5 * speed.tokens


def test_flops_are_those_of_the_matrices(device):
    """The counter includes every pair of tokens, visible or not."""
    model, visibility = build(TINY, device), "columnar"
    inner = causal_lm(model)
    inner.set_attn_implementation("eager")
    batch = random_batch(SMALL, 2, 300)
    with FlopCounterMode(display=False) as counter:
        TargetLoss(model, visibility, torch.bfloat16)(to_tensors(batch, device))[0].backward()
    unseen = int((AttentionBias(to_tensors(batch).placement, visibility).whole() == -torch.inf).sum())
    attention = 12 * unseen * inner.config.num_hidden_layers * inner.config.hidden_size
    # Nothing is trained before the first layer, so its input projections compute no input gradient.
    reading = [getattr(decoder(inner).layers[0].self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
    unneeded = sum(layer.weight.numel() + layer.lora_A["default"].weight.numel() for layer in reading)
    expected = step_flops(inner, batch, visibility) + attention - 2 * batch.tokens * unneeded
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_peaks_match_whole_words():
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA GeForce RTX 4090": 165e12,
    }
    assert {name: peak(name) for name in names} == names
    assert peak("NVIDIA L4") == 121e12
    assert peak("NVIDIA L40S") is None


def test_shapes_have_the_sizes_of_their_names():
    for shape, size in (("05b", 0.494e9), ("7b", 7.62e9)):
        model = build_meta_model(SHAPES[shape].config)
        assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(size, rel=0.01)


def test_a_small_decoding_run(device):
    rows = gpu_decoding.benches(TINY.config, device, main=32, tokens=2)
    assert all(row.measure() > 0 for row in rows)
