"""Logits from hidden states, computed by the model's own head with its caps, scales and biases."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.errors import UserError
from parallelmind.model.hf_compat import DecodedModel
from parallelmind.model.structure import decoder


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """`[tokens, vocab]` logits of `[tokens, width]` hidden states, by the model's own forward."""
    forward = cast(Any, type(model)).forward
    # Some models compare the length of their input with that of the hidden states.
    decoded = forward(DecodedModel(model, hidden[None]), input_ids=None, inputs_embeds=hidden[None])
    return cast(Tensor, decoded.logits[0])


@torch.no_grad()
def check_lm_head(model: PreTrainedModel) -> None:
    """Raise UserError if `head_logits` does not give the model's own logits."""
    ids = torch.tensor([[1, 2]], device=model.device)
    hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    logits = model(input_ids=ids, use_cache=False).logits[0]
    if not torch.allclose(logits.float(), head_logits(model, hidden).float(), rtol=1e-2, atol=1e-2):
        raise UserError(
            f"base_model: the logits of {model.config.model_type} cannot be computed from its hidden states; "
            "choose another model"
        )
