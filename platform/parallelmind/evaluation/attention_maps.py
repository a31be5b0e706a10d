"""Attention maps: how a branch distributes its attention over branches and times of a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from parallelmind.data.packing import make_batch
from parallelmind.engine.model_runner import Model
from parallelmind.errors import UserError
from parallelmind.layout import Tokens
from parallelmind.model.inputs import decoder_inputs, to_tensors
from parallelmind.model.patch_state import is_patched, rope_config
from parallelmind.model.structure import causal_lm, decoder
from parallelmind.tree import MAIN

QueryTokens = Literal["last", "all"]


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """Attention of the query tokens of one branch, averaged over heads and queries.

    weights: `[layers, 1 + N, times]`, attention to the token at (segment, time); segment 0 is main, NaN
    where there is no token. query_segment: segment of the query branch. query_times: times of the query
    tokens.
    """

    weights: NDArray[np.float32]
    query_segment: int
    query_times: list[int]

    def shares(self) -> NDArray[np.float32]:
        """`[layers, 3]`: total attention to main, to the query branch itself and to its siblings.

        A row sums to 1, except for models whose attention has a sink.
        """
        by_sequence = np.nansum(self.weights, axis=2)  # [layers, 1 + N]
        siblings = np.delete(by_sequence, [MAIN, self.query_segment], axis=1).sum(axis=1)
        return np.stack([by_sequence[:, MAIN], by_sequence[:, self.query_segment], siblings], axis=1)


@torch.inference_mode()
def attention_map(
    model: Model, tokens: Tokens, branch: int = 0, query_tokens: QueryTokens = "last"
) -> AttentionMap:
    """Compute the attention map of one branch in one forward pass, with the layout of training.

    branch: the query branch, 0..N-1. query_tokens: its last token, or the mean over all its tokens. The
    attention weights of all layers are in memory at a time. The model must be loaded with
    `attn_implementation="eager"`, since other implementations do not return weights. Raises UserError if the
    model is not patched, `branch` is out of range, or the model returns no attention weights.
    """
    if not is_patched(model):
        raise UserError("patch_rope=false: an attention map needs the patch; drop patch_rope")
    if not 0 <= branch < tokens.branches:
        raise UserError(
            f"branch={branch}: the sample has branches 0 to {tokens.branches - 1}; choose one of them"
        )
    config, inner = rope_config(model), causal_lm(model)
    batch = make_batch([tokens], config, pad_id=0)
    segment, time = batch.segment[0], batch.pos2d[0, :, 1]  # [tokens] each
    queries = np.flatnonzero(segment == branch + 1)[0 if query_tokens == "all" else -1 :]
    inputs = decoder_inputs(inner, to_tensors(batch, inner.device), config.visibility)
    # One [1, heads, tokens, tokens] tensor per layer.
    attentions = getattr(decoder(inner)(**inputs, output_attentions=True), "attentions", None)
    if not attentions or any(layer is None for layer in attentions):
        raise UserError(
            f"base_model: {inner.config.model_type} returns no attention weights; choose another model"
        )
    weights = np.full((len(attentions), 1 + tokens.branches, int(time.max()) + 1), np.nan, dtype=np.float32)
    query_index = torch.from_numpy(queries)
    for number, layer in enumerate(attentions):
        weights[number, segment, time] = layer[0, :, query_index].float().mean(dim=(0, 1)).cpu().numpy()
    return AttentionMap(weights, branch + 1, time[queries].tolist())
