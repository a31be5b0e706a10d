"""Compiled layers: the losses of uncompiled ones, few shapes, bit-exact resumption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from looping import Recorder, assert_same_weights, config, deterministic_metrics, run
from tiny import tiny_llama
from torch._dynamo.utils import counters

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.errors import UserError
from parallelmind.evaluation.tree_law import law_tree
from parallelmind.layout import Batch, Tokens
from parallelmind.model.adapter import add_lora
from parallelmind.model.inputs import to_tensors
from parallelmind.model.patch import patch
from parallelmind.training import compilation
from parallelmind.training.compilation import bucket, compile_layers, pad_to_bucket
from parallelmind.training.loss import TargetLoss

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are traced, and run by PyTorch's own operators."""
    torch.compiler.reset()
    monkeypatch.setattr(compilation, "_BACKEND", "aot_eager")


def batches(packing: bool, lengths: range) -> list[Batch]:
    return [
        make_batch(
            [Tokens.of(list(range(5, 5 + n)), [[3] * (n // 3), [7] * 9]), law_tree()],
            RopeConfig(),
            pad_id=0,
            packing=packing,
        )
        for n in lengths
    ]


def patched_loss() -> TargetLoss:
    model = tiny_llama(attn_implementation="sdpa")
    patch(model, RopeConfig())
    return TargetLoss(add_lora(model, LoraConfig(lora_rank=2), seed=0), "columnar").train()


def gradients(loss: TargetLoss, batch: Batch) -> torch.Tensor:
    loss.zero_grad()
    loss(to_tensors(batch))[0].backward()
    return torch.cat([weight.grad.flatten() for weight in loss.parameters() if weight.grad is not None])


def test_buckets_are_few_and_at_most_half_of_a_batch_more() -> None:
    sizes = range(1, 4097)
    assert all(size <= bucket(size) <= 3 / 2 * size for size in sizes)
    assert len({bucket(size) for size in sizes}) == 24


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_padding_to_a_bucket_changes_no_gradient(packing: bool) -> None:
    loss = patched_loss()
    (batch,) = batches(packing, range(20, 21))
    padded = pad_to_bucket(batch)
    assert padded.ids.shape[1] >= 64
    assert (padded.tokens, padded.targets) == (batch.tokens, batch.targets)
    assert np.array_equal(padded.labels[padded.labels != -100], batch.labels[batch.labels != -100])
    torch.testing.assert_close(gradients(loss, padded), gradients(loss, batch), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_new_lengths_do_not_recompile(packing: bool, quick_compiler: None) -> None:
    loss, plain = patched_loss(), patched_loss()
    compile_layers(loss.model)
    first, *others = map(pad_to_bucket, batches(packing, range(20, 26)))
    gradients(loss, first)
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    for batch in others:
        torch.testing.assert_close(gradients(loss, batch), gradients(plain, batch), rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_compiled_run_resumes_exactly(tmp_path: Path, checkpointing: bool, quick_compiler: None) -> None:
    check_run(tmp_path, gradient_checkpointing=checkpointing)


@pytest.mark.slow
def test_the_real_compiler_resumes_exactly(tmp_path: Path) -> None:
    torch.compiler.reset()
    check_run(tmp_path)


def check_run(folder: Path, **fields: object) -> None:
    """A compiled run has the losses of an uncompiled one, and equals itself when it is interrupted."""
    settings = config(epochs=1, compile=True, lora_dropout=0.0, **fields)
    undisturbed = run(settings, folder / "whole")
    plain = run(settings.replace(compile=False), folder / "plain")
    assert undisturbed.outcome.metrics["loss"] == pytest.approx(plain.outcome.metrics["loss"], rel=1e-4)
    before = counters["stats"]["unique_graphs"]
    stopped = run(settings, folder / "cut", Recorder(stop_at=2))
    resumed = run(settings, folder / "cut")
    assert counters["stats"]["unique_graphs"] == before, "a second model of the same shape compiles nothing"
    assert_same_weights(resumed.weights, undisturbed.weights)
    metrics = deterministic_metrics(stopped) | deterministic_metrics(resumed)
    assert metrics == deterministic_metrics(undisturbed)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="compile=true: finds no decoder layers"):
        compile_layers(torch.nn.Linear(1, 1))
