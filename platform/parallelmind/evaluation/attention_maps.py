"""Attention maps: how a branch or a reduce distributes its attention over segments and times of a sample."""

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
from parallelmind.tree import JOINED, PATH, SIBLING, Tree, relations

QueryTokens = Literal["last", "all"]


@dataclass(frozen=True, slots=True)
class AttentionMap:
    """Attention of the query tokens of one branch or reduce, averaged over heads and queries.

    weights: `[layers, segments, times]`, attention to the token at (segment, time); segment 0 is main, NaN
    where there is no token. query_segment: segment of the query tokens. query_times: their times. tree: the
    shape of the sample.
    """

    weights: NDArray[np.float32]
    query_segment: int
    query_times: list[int]
    tree: Tree

    def shares(self) -> dict[str, NDArray[np.float32]]:
        """`[layers]` total attention to each group of segments; they sum to 1 for models without a sink.

        main: main, and the branches that the query continues. own: the query's own segment. siblings: others.
        joined: the branches that a reduce reads, if the query is one or continues one.
        """
        by_segment = np.nansum(self.weights, axis=2)  # [layers, segments]
        relation = relations(self.tree)[self.query_segment]
        own = np.arange(len(relation)) == self.query_segment
        groups = {"main": (relation == PATH) & ~own, "own": own, "siblings": relation == SIBLING}
        if (relation == JOINED).any():
            groups["joined"] = relation == JOINED
        return {name: by_segment[:, group].sum(axis=1) for name, group in groups.items()}


@torch.inference_mode()
def attention_map(
    model: Model, tokens: Tokens, branch: int = 0, query_tokens: QueryTokens = "last"
) -> AttentionMap:
    """Compute the attention map of one branch in one forward pass, with the layout of training.

    branch: the query branch or reduce, by its number as a segment minus 1. query_tokens: its last token, or
    the mean over all its tokens. The attention weights of all layers are in memory at a time. The model must
    be loaded with `attn_implementation="eager"`, since other implementations do not return weights. Raises
    UserError for an unpatched model, a `branch` out of range, and a model that returns no attention weights.
    """
    if not is_patched(model):
        raise UserError("patch_rope=false: an attention map needs the patch; drop patch_rope")
    last = tokens.tree.segments - 2
    if not 0 <= branch <= last:
        counted = ", its reduce included" if tokens.tree.is_reduce.any() else ""
        raise UserError(
            f"branch={branch}: the sample has the indices 0 to {last}{counted}; choose one of them"
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
    shape = (len(attentions), tokens.tree.segments, int(time.max()) + 1)
    weights = np.full(shape, np.nan, dtype=np.float32)
    query_index = torch.from_numpy(queries)
    for number, layer in enumerate(attentions):
        weights[number, segment, time] = layer[0, :, query_index].float().mean(dim=(0, 1)).cpu().numpy()
    return AttentionMap(weights, branch + 1, time[queries].tolist(), tokens.tree)
