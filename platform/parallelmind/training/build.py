"""The model that a run trains: base, patch and adapter."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from parallelmind.config import TrainConfig
from parallelmind.model.adapter import add_lora, resume_adapter
from parallelmind.model.base_model import load_base
from parallelmind.model.lm_head import check_lm_head
from parallelmind.model.patch import patch
from parallelmind.training.sharding import host_mesh


def build_model(config: TrainConfig, device: torch.device) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The patched model on `device`, with float32 weights where it is trained, and its tokenizer.

    With sharding=full every worker loads its part of every base weight on the CPU, and `sharding.shard` moves
    the model; this is then a collective operation. Raises UserError for a model that cannot be trained.
    """
    is_full, is_sharded = config.optimizer.tuning == "full", config.workers.sharding == "full"
    base = config.model.model_copy(update={"dtype": "float32"}) if is_full else config.model
    model, tokenizer = load_base(base, mesh=host_mesh() if is_sharded else None)
    if not is_sharded:
        check_lm_head(model)
    if config.rope.patch_rope:
        patch(model, config.rope)
    trained: nn.Module = model
    if config.optimizer.resume_adapter is not None:
        trained = resume_adapter(model, tokenizer, config.optimizer.resume_adapter, config.lora)
    elif not is_full:
        trained = add_lora(model, config.lora, config.optimizer.seed)
    return trained if is_sharded else trained.to(device), tokenizer
