"""The gathered loss against full logits, the mean over all targets against one big batch, and what a step
never holds.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallelmind.config import LoraConfig, OptimizerConfig, RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.errors import UserError
from parallelmind.layout import Batch, Tokens
from parallelmind.model.adapter import add_lora
from parallelmind.model.inputs import decoder_inputs, to_tensors
from parallelmind.model.lm_head import check_lm_head
from parallelmind.model.patch import patch
from parallelmind.model.structure import causal_lm
from parallelmind.training import loss as loss_module
from parallelmind.training.loss import TargetLoss, target_loss
from parallelmind.training.step import accumulate_gradients, learning_rate, trainable

ROPE = RopeConfig()


def lora_model(rope: RopeConfig = ROPE) -> nn.Module:
    model = tiny_llama()
    if rope.patch_rope:
        patch(model, rope)
    wrapped = add_lora(model, LoraConfig(lora_rank=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in trainable(wrapped):
            weight.normal_(
                0, 0.05, generator=generator
            )  # fresh LoRA adds nothing: then inactive layers would go unseen
    return wrapped.eval()


def sample(seed: int, main: int, lengths: list[int]) -> Tokens:
    draw = np.random.default_rng(seed)
    main_ids, *branches = (draw.integers(3, 300, n).tolist() for n in (main, *lengths))
    return Tokens.of(main_ids, branches, [1] * len(lengths))


def batch_of(*samples: Tokens, rope: RopeConfig = ROPE) -> Batch:
    return make_batch(samples, rope, pad_id=0)


def full_loss(model: nn.Module, batch: Batch, rope: RopeConfig = ROPE) -> Tensor:
    tensors = to_tensors(batch)
    logits = model(**decoder_inputs(causal_lm(model), tensors, rope.visibility)).logits
    return F.cross_entropy(
        logits.float().flatten(0, 1), torch.from_numpy(batch.labels).flatten(), reduction="sum"
    )


@pytest.mark.parametrize(
    "rope", [ROPE, RopeConfig(visibility="isolated", positions="flat"), RopeConfig(patch_rope=False)]
)
def test_equals_the_cross_entropy_of_full_logits(rope: RopeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "_MAX_LOGITS", 2 * 300)  # two targets at a time
    model = lora_model(rope)
    lengths = [4, 6] if rope.patch_rope else [6]
    batch = batch_of(sample(0, 5, lengths), sample(1, 0, lengths[:1]), rope=rope)
    loss, targets = target_loss(model, to_tensors(batch), rope.visibility)
    expected = full_loss(model, batch, rope)
    assert targets == batch.targets
    torch.testing.assert_close(loss, expected)
    loss.backward()
    actual = [weight.grad for weight in trainable(model)]
    model.zero_grad()
    expected.backward()
    for gradient, weight in zip(actual, trainable(model), strict=True):
        torch.testing.assert_close(
            gradient, weight.grad, rtol=1e-4, atol=1e-4
        )  # float32 sums, added up in another order


def test_a_batch_without_targets_is_zero() -> None:
    tokens = Tokens.of([5, 6], [[7, 8]], [9])
    loss, targets = target_loss(lora_model(), to_tensors(batch_of(tokens)), "columnar")
    assert (float(loss.detach()), targets) == (0.0, 0)


def gradients(model: nn.Module, parts: list[list[Batch]]) -> list[Tensor]:
    """The gradient of `optimizer_step`, with the workers one after another: sum of gradients per target."""
    sums = [torch.zeros_like(weight) for weight in trainable(model)]
    targets = 0.0
    for batches in parts:
        model.zero_grad()
        targets += accumulate_gradients(TargetLoss(model, "columnar"), iter(batches), len(batches))[0].targets
        for total, weight in zip(sums, trainable(model), strict=True):
            total += 0 if weight.grad is None else weight.grad
    return [total / targets for total in sums]


def test_mean_over_targets_does_not_depend_on_the_split() -> None:
    samples = [sample(0, 4, [3, 9]), sample(1, 0, [2]), sample(2, 6, [5, 5, 5])]
    model = lora_model()
    together = gradients(model, [[batch_of(*samples)]])
    ways = [
        [[batch_of(samples[0])], [batch_of(samples[1]), batch_of(samples[2])]],
        [[batch_of(*samples)], []],
    ]
    for way in ways:
        for one, other in zip(together, gradients(model, way), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_head_that_its_class_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    check_lm_head(model)
    forward = model.forward

    def capped(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output

    monkeypatch.setattr(model, "forward", capped)
    with pytest.raises(UserError, match="cannot be computed from its hidden states"):
        check_lm_head(model)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_rises_then_falls(schedule: str) -> None:
    config = OptimizerConfig.model_validate({"learning_rate": 1.0, "warmup_ratio": 0.1, "schedule": schedule})
    rates = [learning_rate(config, step, 100) for step in range(120)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1.0
    assert rates[110] == (1.0 if schedule == "constant" else 0.0)
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))


class Outputs(TorchDispatchMode):
    """Every tensor that any operation returns, gradients included; kept, so that no storage is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.tensors += [item for item in tree_leaves(out) if isinstance(item, Tensor)]
        return out


def answers_only(tokens: Tokens) -> Tokens:
    """The same text with one target per branch."""
    main, *branches = tokens.split()
    return Tokens.of(main, branches, [len(branch) - 1 for branch in branches])


def test_no_logits_without_a_target_and_one_mask_for_all_layers():
    model = lora_model()
    vocabulary = model.config.vocab_size
    batch = make_batch([answers_only(sample(n, 40, [9, 7, 8, 6])) for n in range(2)], ROPE, pad_id=0)
    tokens = batch.ids.shape[1]
    with Outputs() as outputs:
        accumulate_gradients(TargetLoss(model, ROPE.visibility), iter([batch]), 1)
    weights = {shape for weight in model.parameters() for shape in (weight.shape, weight.shape[::-1])}
    logits = [
        out
        for out in outputs.tensors
        if out.dim() > 1 and out.shape[-1] == vocabulary and out.shape not in weights
    ]
    assert max(out.shape[:-1].numel() for out in logits) == batch.targets
    squares = [
        out for out in outputs.tensors if out.is_floating_point() and out.shape[-2:] == (tokens, tokens)
    ]
    assert max(out.numel() for out in squares) == 2 * tokens * tokens  # not one per head
    whole = [out for out in squares if out.numel() == 2 * tokens * tokens]  # without those of a single row
    assert len({out.untyped_storage().data_ptr() for out in whole}) == 1  # not one per layer
