"""Sharded models in a process group of one: what FSDP gathers, and equal gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, VARIANTS, variant
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from parallelmind.config import LoraConfig, RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.evaluation.probes import BRANCHES, MAIN
from parallelmind.evaluation.tiny_models import tiny_model
from parallelmind.layout import Tokens
from parallelmind.model.adapter import add_lora
from parallelmind.model.patch import patch
from parallelmind.training.loss import TargetLoss
from parallelmind.training.sharding import shard
from parallelmind.training.step import accumulate_gradients

ROPE = RopeConfig()
BATCH = make_batch([Tokens.of(MAIN, BRANCHES)], ROPE, pad_id=0)


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def learner(model: PreTrainedModel) -> TargetLoss:
    """The model with the patch and an adapter that is not zero."""
    patch(model, ROPE)
    adapted = add_lora(model, LoraConfig(lora_rank=2), seed=0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(weight, 0.05)
    adapted.get_base_model().activation_checkpointing_enable()
    return TargetLoss(adapted, ROPE.visibility).train()


def gradients(loss: TargetLoss) -> dict[str, Tensor]:
    accumulate_gradients(loss, iter([BATCH]), 1)
    found = {name: weight.grad for name, weight in loss.named_parameters() if weight.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_a_sharded_model_has_the_gradients_of_a_whole_one(family: str, one_process: None) -> None:
    """The weights of a part that its layer does not call as a module would not be gathered."""
    expected = gradients(learner(variant(family)))
    loss = learner(variant(family))
    shard(loss, torch.device("cpu"))
    actual = gradients(loss)
    assert actual.keys() == expected.keys()
    whole, sharded = (torch.cat([found[name].flatten() for name in expected]) for found in (expected, actual))
    assert float((sharded - whole).norm() / whole.norm()) <= 1e-5


def test_attention_and_mlp_are_gathered_apart(one_process: None) -> None:
    loss = learner(variant("shared"))
    shard(loss, torch.device("cpu"))
    assert isinstance(loss.model, PeftModel)
    layer = loss.model.get_base_model().model.layers[0]
    units = {name for name, module in layer.named_modules() if isinstance(module, FSDPModule)}
    assert units == {"", "self_attn", "mlp"}


def test_dropout_is_no_reason_to_refuse_a_model(one_process: None) -> None:
    loss = learner(tiny_model("seed_oss", "eager", attention_dropout=0.5))
    shard(loss, torch.device("cpu"))
    assert loss.training
