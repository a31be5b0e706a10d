"""Attention with learned penalties, and its gradients: by blocks, dense, and in eager models."""

from __future__ import annotations

import pytest
import torch
from families import variant
from flexing import long_batch
from penalties import LEARNED, learning
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from tree_losses import training_loss

from parallelmind.config import RopeConfig
from parallelmind.data.tree_batch import tree_batch
from parallelmind.model import attention
from parallelmind.model.attention import BLOCKS, choose_attention
from parallelmind.model.block_attention import QUERIES
from parallelmind.model.inputs import Tensors
from parallelmind.model.mask import AttentionBias, SiblingBias
from parallelmind.model.patch import patch
from parallelmind.model.penalty import NAME, SiblingPenalty, penalty_weights
from parallelmind.model.penalty_attention import BlockPenaltyMask, DensePenaltyMask
from parallelmind.training.loss import TargetLoss
from parallelmind.visibility import AttentionWindow

WINDOWS = [AttentionWindow(), AttentionWindow(window=20)]


def masks(window: AttentionWindow) -> tuple[BlockPenaltyMask, DensePenaltyMask]:
    """Of the same two rows, in float64."""
    placed = long_batch(LEARNED).placement
    own = AttentionBias(placed, "isolated", window=window, dtype=torch.float64)
    siblings = SiblingBias(placed, window, torch.float64)
    blocks = [(own.blocks(row, QUERIES), siblings.blocks(row, QUERIES)) for row in range(len(placed.time))]
    return BlockPenaltyMask(blocks), DensePenaltyMask(own.whole(), siblings.whole())


def states(tokens: int, heads: int = 6, kv_heads: int = 2) -> list[Tensor]:
    """Query, key and value in float64 with gradients."""
    random = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, count, tokens, 8, dtype=torch.float64, generator=random).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


class Attention(nn.Module):
    """Stands for an attention module with a penalty for each of six heads."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(NAME, SiblingPenalty(6, torch.device("cpu")))
        weight = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.5, -0.7], dtype=torch.float64)
        self.sibling_penalty.weight = nn.Parameter(weight)

    @property
    def penalty(self) -> nn.Parameter:
        return self.sibling_penalty.weight


def reference(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, softcap, sinks) -> Tensor:
    """`[rows, tokens, heads, dim]` in plain operators."""
    key, value = (state.repeat_interleave(3, dim=1) for state in (key, value))
    scores = query @ key.transpose(-1, -2) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores + bias
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("window", WINDOWS, ids=["", "window"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_blocks_compute_what_a_dense_mask_does_with_the_same_gradients(window, softcap, with_sinks):
    by_blocks, dense = masks(window)
    module = Attention()
    sinks = torch.linspace(-1, 1, 6, dtype=torch.float64) if with_sinks else None
    query, key, value = states(by_blocks.shape[-1])
    out = by_blocks.of_layer(module).attend(query, key, value, 0.3, softcap, sinks)
    expected = reference(query, key, value, dense.of_layer(module), softcap, sinks)
    tolerance = 1e-10 if softcap is None and sinks is None else 1e-5  # scores in float32
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [query, key, value, module.penalty]
    gradients = torch.autograd.grad((out * weights).sum(), leaves)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves)
    for gradient, expected_gradient in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=tolerance, atol=20 * tolerance)
    assert wanted[3].abs().min() > 1e-3


def test_the_gradient_of_a_penalty_is_that_of_finite_differences():
    by_blocks, _ = masks(AttentionWindow())
    module, fixed = Attention(), [state.detach() for state in states(by_blocks.shape[-1])]

    def loss() -> Tensor:
        return by_blocks.of_layer(module).attend(*fixed, 0.3).square().sum()

    (gradient,) = torch.autograd.grad(loss(), module.penalty)
    for head in range(6):
        with torch.no_grad():
            module.penalty[head] += 1e-5
            above = loss()
            module.penalty[head] -= 2e-5
            below = loss()
            module.penalty[head] += 1e-5
        torch.testing.assert_close(gradient[head], (above - below) / 2e-5, rtol=1e-6, atol=1e-6)


def loss_and_gradients(model: nn.Module, batch: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss, _ = TargetLoss(model, "columnar", torch.float32)(batch)
    loss.backward()
    return loss.detach(), {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }


@pytest.mark.parametrize("name", ["llama", "windows beside full attention"])
def test_a_model_has_the_same_gradients_by_blocks_dense_and_eager(name, monkeypatch):
    make = tiny_llama if name == "llama" else lambda: variant(name, "sdpa")
    batch = long_batch(LEARNED)
    by_blocks = learning(make())
    assert choose_attention(by_blocks, batch.ids.shape[1], torch.float32, is_flat=True) == BLOCKS
    loss, gradients = loss_and_gradients(by_blocks, batch)
    assert sum(NAME in name for name in gradients) == by_blocks.config.num_hidden_layers
    model = make()
    model.set_attn_implementation("eager")
    eager_loss, eager = loss_and_gradients(learning(model), batch)
    monkeypatch.setattr(attention, "_takes_backends", lambda model: False)
    dense_loss, dense = loss_and_gradients(by_blocks, batch)
    for other_loss, other in ((eager_loss, eager), (dense_loss, dense)):
        torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=0)
        assert gradients.keys() == other.keys()
        for name, gradient in gradients.items():
            assert (gradient - other[name]).norm() <= 1e-4 * gradient.norm(), name


def test_equal_penalties_compute_what_a_number_does():
    batch = long_batch(LEARNED)
    learned, fixed = tiny_llama(), tiny_llama()
    patch(learned, LEARNED)
    patch(fixed, RopeConfig(sibling_penalty=1.0))
    losses = [TargetLoss(model, "columnar", torch.float32)(batch)[0] for model in (learned, fixed)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


def test_trees_have_penalties_between_siblings_alone(monkeypatch):
    leaf = {"prompt": "who", "completion": " lives"}
    record = {"main": "The passage.", "branches": [{**leaf, "branches": [leaf, leaf], "reduce": leaf}, leaf]}
    batch = tree_batch(tiny_tokenizer(), [record], LEARNED)
    model = learning(tiny_llama())
    loss, _ = training_loss(model, batch, LEARNED)
    loss.backward()
    gradients = [weight.grad.clone() for weight in penalty_weights(model)]
    model.zero_grad()
    monkeypatch.setattr(attention, "_takes_backends", lambda model: False)
    dense, _ = training_loss(model, batch, LEARNED)
    dense.backward()
    torch.testing.assert_close(loss, dense, rtol=1e-5, atol=0)
    for gradient, weight in zip(gradients, penalty_weights(model), strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-3, atol=1e-5)
