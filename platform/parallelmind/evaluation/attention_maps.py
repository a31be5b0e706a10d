"""Where a branch looks: the share of its attention that goes to each (branch, time) of a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from parallelmind.data.packing import make_batch
from parallelmind.engine.model_runner import Model
from parallelmind.errors import UserError
from parallelmind.layout import MAIN, Tokens
from parallelmind.model.patch import is_patched, rope_config
from parallelmind.model.structure import causal_lm, decoder
from parallelmind.training.loss import decoder_inputs, to_tensors

QueryTokens = Literal["last", "all"]


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """Attention of one branch, averaged over heads.

    mass: `[layers, 1 + N, times]` share on the token there, main in row 0; nan where no token is. sequence:
    the row that asks. times: `[queries]` when the tokens that ask stand.
    """

    mass: NDArray[np.float32]
    sequence: int
    times: list[int]

    def shares(self) -> NDArray[np.float32]:
        """`[layers, 3]`: what goes to main, to the own branch and to its siblings.

        A row adds up to 1, but for models that let attention go nowhere.
        """
        rows = np.nansum(self.mass, axis=2)  # [layers, 1 + N]
        siblings = np.delete(rows, [MAIN, self.sequence], axis=1).sum(axis=1)
        return np.stack([rows[:, MAIN], rows[:, self.sequence], siblings], axis=1)


@torch.inference_mode()
def attention_map(
    model: Model, tokens: Tokens, branch: int = 0, asking: QueryTokens = "last"
) -> AttentionMap:
    """One forward pass over main and all branches, in training's layout; every layer's attention is held for
    its length.

    branch: who asks, 0..N-1. asking: its last token alone, or the mean over all of its tokens. The model must
    be loaded with `attn_implementation="eager"`: no other attention tells its weights. Raises UserError where
    there are none to tell.
    """
    if not is_patched(model):
        raise UserError("patch_rope=false: without the patch there are no branches to map; leave it out")
    if not 0 <= branch < tokens.branches:
        raise UserError(
            f"branch={branch}: the sample has branches 0 to {tokens.branches - 1}; choose one of them"
        )
    config, inner = rope_config(model), causal_lm(model)
    batch = make_batch([tokens], config, pad_id=0)
    sequence, time = batch.sequence[0], batch.pos2d[0, :, 1]
    queries = np.flatnonzero(sequence == branch + 1)[0 if asking == "all" else -1 :]
    inputs = decoder_inputs(inner, to_tensors(batch, inner.device), config.visibility)
    weights = getattr(
        decoder(inner)(**inputs, output_attentions=True), "attentions", None
    )  # of each [1, heads, tokens, tokens]
    if not weights or any(layer is None for layer in weights):
        raise UserError(
            f"base_model: {inner.config.model_type} does not tell its attention weights; choose another model"
        )
    mass = np.full((len(weights), 1 + tokens.branches, int(time.max()) + 1), np.nan, dtype=np.float32)
    asked = torch.from_numpy(queries)
    for number, layer in enumerate(weights):
        mass[number, sequence, time] = layer[0, :, asked].float().mean(dim=(0, 1)).cpu().numpy()  # [tokens]
    return AttentionMap(mass, branch + 1, time[queries].tolist())
