"""Logits from hidden states by the model's own rules: a cap, a scale or a bias of its head need no formula
here.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.errors import UserError
from parallelmind.model.structure import decoder, decoder_name


class _Known:
    """The output of a decoder that has already run."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None


class _Decoded:
    """A model whose decoder answers with hidden states that are known; all else is the model's own."""

    def __init__(self, model: PreTrainedModel, hidden: Tensor) -> None:
        self._model, self._decoder, self._hidden = model, decoder_name(model), hidden

    def __getattr__(self, name: str) -> Any:
        return (
            (lambda *args, **kwargs: _Known(self._hidden))
            if name == self._decoder
            else getattr(self._model, name)
        )


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """`[tokens, vocab]` logits of `[tokens, width]` hidden states: the class's own forward, past its
    decoder.
    """
    forward = cast(Any, type(model)).forward
    return cast(Tensor, forward(_Decoded(model, hidden[None]), input_ids=None).logits[0])


@torch.no_grad()
def check_lm_head(model: PreTrainedModel) -> None:
    """Raises UserError if the model's logits are not what its class makes of its hidden states."""
    ids = torch.tensor([[1, 2]], device=model.device)
    hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    logits = model(input_ids=ids, use_cache=False).logits[0]
    if not torch.allclose(logits.float(), head_logits(model, hidden).float(), rtol=1e-2, atol=1e-2):
        raise UserError(
            f"base_model: the logits of {model.config.model_type} are not its own forward over its hidden states; "
            "choose another model"
        )
