"""Law 7: the gradients of a tree are the sum of the gradients of its separate rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.evaluation.probes import LawViolationError, patched
from parallelmind.layout import Tokens
from parallelmind.model.inputs import to_tensors
from parallelmind.model.structure import eval_mode
from parallelmind.training.loss import target_loss
from parallelmind.tree import NO_PARENT, Mask, Tree, with_context

TOLERANCE = 1e-5  # relative L2 norm, in float32
_CONFIG = RopeConfig(rope_2d_ratio=0, visibility="isolated", positions="time")

# Three levels of branches below main; a branch that joins its own; a reduce of main that forks again.
_PARENTS = [NO_PARENT, 0, 1, 2, 2, 1, 0, 6, 6, 6, 0, 10, 10]
_REDUCES = [9, 10]
_LENGTHS = [8, 4, 3, 5, 2, 6, 3, 4, 5, 3, 4, 2, 3]


def law_tree() -> Tokens:
    """A tree of 13 segments and three levels of branches, two of whose segments are reduces."""
    is_reduce = np.zeros(len(_PARENTS), dtype=bool)
    is_reduce[_REDUCES] = True
    ends = np.cumsum(_LENGTHS) + 3  # the first ids are special tokens
    segments = [list(range(end - length, end)) for end, length in zip(ends, _LENGTHS, strict=True)]
    return Tokens.of_tree(segments, Tree(np.array(_PARENTS), is_reduce))


def tree_distance(model: PreTrainedModel) -> float:
    """Relative L2 distance of the gradients of a tree from the sum of those of its rows.

    The row of a segment without a reduce on its path is a plain text for the unpatched model. Any other row
    is the tree without all that its segment does not read. A chain of forks with one branch each is one plain
    text, reduces included.
    """
    tree = law_tree()
    with eval_mode(model), _smaller_weights(model):
        with patched(model, _CONFIG):
            actual = _gradients(model, [tree])
            pruned = _gradients(model, [row for row in _rows(tree) if row.tree.is_reduce.any()])
            chain = _gradients(model, [_chain()])
        plain = [_as_text(row) for row in _rows(tree) if not row.tree.is_reduce.any()]
        expected = _gradients(model, plain) + pruned
        text = _gradients(model, [_as_text(_chain())])
    return max(_distance(actual, expected), _distance(chain, text))


def check_tree_gradients(model: PreTrainedModel) -> None:
    """Law 7: with `isolated`, ratio 0 and positions=time, a tree has the gradients of its separate rows."""
    distance = tree_distance(model)
    if not distance <= TOLERANCE:
        raise LawViolationError(f"gradients of a tree and of its separate rows differ by {distance:.2g}")


@contextmanager
def _smaller_weights(model: PreTrainedModel) -> Iterator[None]:
    """Halve the matrices within the context: a recurrent depth amplifies rounding by large weights."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    saved = [weight.detach().clone() for weight in matrices]
    with torch.no_grad():
        for weight in matrices:
            weight.mul_(0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(matrices, saved, strict=True):
                weight.copy_(original)


def _rows(tokens: Tokens) -> Iterator[Tokens]:
    """For every segment with targets, all that it reads, with the targets of this segment alone."""
    segment_of = np.repeat(np.arange(tokens.tree.segments), tokens.lengths)
    for segment in range(1, tokens.tree.segments):
        kept = with_context(np.arange(tokens.tree.segments) == segment, tokens.tree)
        targets = tokens.targets & (segment_of == segment)
        yield Tokens(tokens.ids, tokens.lengths, targets, tokens.tree).take(kept)


def _as_text(tokens: Tokens) -> Tokens:
    """The segments one after another as a single branch."""
    return Tokens.of([], [tokens.ids.tolist()], targets=[tokens.targets])


def _chain() -> Tokens:
    """Forks with one branch each, joined again: main, branch, branch below, reduce, reduce."""
    is_reduce: Mask = np.array([False, False, False, True, True])
    segments = [list(range(3 + 5 * number, 7 + 5 * number)) for number in range(5)]
    return Tokens.of_tree(segments, Tree(np.array([NO_PARENT, 0, 1, 1, 0]), is_reduce))


def _gradients(model: PreTrainedModel, samples: list[Tokens]) -> Tensor:
    """All gradients of the summed loss of the samples, flattened, in float64."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    total = torch.zeros((), device=model.device)
    for sample in samples:
        batch = to_tensors(make_batch([sample], _CONFIG, pad_id=0), model.device)
        total = total + target_loss(model, batch, _CONFIG.visibility)[0]
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    known = (
        torch.zeros_like(weight) if gradient is None else gradient
        for weight, gradient in zip(weights, gradients, strict=True)
    )
    return torch.cat([gradient.flatten().double() for gradient in known])


def _distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()
