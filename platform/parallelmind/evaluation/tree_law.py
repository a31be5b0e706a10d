"""The laws of trees: the logits and gradients of separate rows, and siblings that do not matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.data.packing import make_batch
from parallelmind.engine.decoding_check import layout_logits
from parallelmind.evaluation.probes import (
    LawViolationError,
    check_close,
    check_differ,
    patched,
    plain_logits,
)
from parallelmind.layout import Tokens, arrange
from parallelmind.model.inputs import to_tensors
from parallelmind.model.structure import eval_mode
from parallelmind.training.loss import target_loss
from parallelmind.tree import NO_PARENT, Mask, Tree, with_context, with_readers

TOLERANCE = 1e-5  # relative L2 norm, in float32
_CONFIG = RopeConfig(rope_2d_ratio=0, visibility="isolated", positions="time")

# Three levels of branches below main; a branch that joins its own; a reduce of main that forks again.
_PARENTS = [NO_PARENT, 0, 1, 2, 2, 1, 0, 6, 6, 6, 0, 10, 10]
_REDUCES = [9, 10]
_CHANGED, _OTHER_TOKEN = 3, 99  # the segment that a law changes, and the id that it gets
_LENGTHS = [8, 4, 3, 5, 2, 6, 3, 4, 5, 3, 4, 2, 3]


def law_tree() -> Tokens:
    """A tree of 13 segments and three levels of branches, two of whose segments are reduces."""
    is_reduce = np.zeros(len(_PARENTS), dtype=bool)
    is_reduce[_REDUCES] = True
    ends = np.cumsum(_LENGTHS) + 3  # the first ids are special tokens
    segments = [list(range(end - length, end)) for end, length in zip(ends, _LENGTHS, strict=True)]
    return Tokens.of_tree(segments, Tree(np.array(_PARENTS), is_reduce))


def check_tree_paths(model: PreTrainedModel) -> None:
    """Law 2: with `isolated`, ratio 0 and positions=time, a segment equals its path run alone as one text.

    A path with a reduce is one text if all its forks have a single branch.
    """
    for tokens in (law_tree(), _chain()):
        with patched(model, _CONFIG):
            actual = layout_logits(model, arrange(tokens, _CONFIG), _CONFIG)
        for segment, row in enumerate(_rows(tokens), start=1):
            if not _is_one_text(row.tree):
                continue
            expected = plain_logits(model, row.ids.tolist())[-int(tokens.lengths[segment]) :]
            check_close(actual[segment], expected, "a segment of a tree and its path as one text")


def check_tree_siblings(model: PreTrainedModel) -> None:
    """Law 4: a change affects the segments that read it alone, with `columnar` also later times of others."""
    before = law_tree()
    changed = before.ids.copy()
    changed[int(before.lengths[:_CHANGED].sum())] = _OTHER_TOKEN
    after = replace(before, ids=changed)
    readers = with_readers(np.arange(before.tree.segments) == _CHANGED, before.tree)
    for visibility in ("isolated", "columnar"):
        with patched(model, RopeConfig(visibility=visibility, sibling_penalty=0)) as config:
            layout = arrange(before, config)
            pair = [layout_logits(model, arrange(tokens, config), config) for tokens in (before, after)]
        changed_at = int(layout.time[layout.segment == _CHANGED].min())
        check_differ(pair[0][_CHANGED], pair[1][_CHANGED], "a changed segment")
        for segment in np.flatnonzero(~readers):
            old, new = (logits[segment] for logits in pair)
            times = np.sort(layout.time[layout.segment == segment])
            same = torch.from_numpy(times <= (changed_at if visibility == "columnar" else times.max()))
            check_close(old[same], new[same], f"a segment that reads no changed one ({visibility})")


def tree_distance(model: PreTrainedModel) -> float:
    """Relative L2 distance of the gradients of a tree from the sum of those of its rows.

    A row holds what one segment reads. Where that is one text, the unpatched model computes it; else it is a
    smaller tree. A chain of forks with one branch each is one text, reduces included.
    """
    tree = law_tree()
    with eval_mode(model), _smaller_weights(model):
        with patched(model, _CONFIG):
            actual = _gradients(model, [tree])
            pruned = _gradients(model, [row for row in _rows(tree) if not _is_one_text(row.tree)])
            chain = _gradients(model, [_chain()])
        plain = [_as_text(row) for row in _rows(tree) if _is_one_text(row.tree)]
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
        yield Tokens(tokens.ids, tokens.lengths, targets, tokens.tree).take(np.flatnonzero(kept))


def _is_one_text(tree: Tree) -> bool:
    """Whether no segment has two branches."""
    return len(set(tree.parents[tree.is_branch].tolist())) == tree.branches


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
