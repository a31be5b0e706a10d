"""Which tokens of one sample a step computes. Pure functions, NumPy only.

A cached step must compute exactly what one full forward pass over the final tokens computes. That decides the
order in which tokens may enter the cache:

- *Free order* (`layout.is_free_order`): nothing depends on the siblings' progress. Prompts are computed as
  fast as the budget allows, each after all that it reads, and every step computes the newest token of each
  decoding branch.
- *Column order*: tokens enter by columns of time. The first steps compute the columns before the one in which
  a branch decodes its first token. From then on each step computes one column, with the token that each
  branch has there: the next token of a longer prompt, which may attend to (or be counted after) a token that
  a shorter sibling has just decoded; the newest token; or the last token of a finished branch, which running
  siblings may still attend to. A branch that is added late starts in the next column, because the keys and
  values of earlier columns are final.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from parallelmind.engine.sequence import NO_LABELS, PromptLabels, ScheduledTokens, SegmentState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.tree import MAIN, Ints


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """How far a sample is computed.

    num_computed: `[segments]` tokens in the cache. next_column: the first column that is not in the cache.
    deferred: segments that wait for another sample, which computes the same blocks.
    """

    num_computed: Ints
    next_column: int = 0
    deferred: Collection[int] = ()

    @staticmethod
    def of(group: SequenceGroup) -> Progress:
        return Progress(_per_segment(group.segments, "num_computed"), group.next_column)


def schedule_tokens(group: SequenceGroup, budget: int, progress: Progress | None = None) -> ScheduledTokens:
    """Choose the next tokens of a sample.

    budget: prompt tokens to compute at most. Column order computes at least one column. The newest
        tokens of decoding branches are always chosen.
    progress: by default that of the sample.
    """
    progress = progress or Progress.of(group)
    if group.free_order:
        next_column, counts = 0, _free_order_counts(group, budget, progress)
    else:
        next_column, counts = _column_order_counts(group, budget, progress)
    segments, shape, num_computed = group.segments, group.shape, progress.num_computed
    segment = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(segment)) + np.repeat(num_computed - np.cumsum(counts) + counts, counts)
    time, ids = group.start_times[segment] + index, _next_ids(segments, num_computed, counts)
    is_last = index == _per_segment(segments, "num_tokens")[segment] - 1
    needs_logits = is_last & _per_segment(segments, "is_running").astype(bool)[segment]
    if not group.free_order:
        order = np.lexsort((segment, time))
        segment, time, ids, needs_logits = segment[order], time[order], ids[order], needs_logits[order]
        index = index[order]
    logits_indices = np.flatnonzero(needs_logits)
    in_time = group.config.positions == "time"
    return ScheduledTokens(
        ids=ids,
        segment=segment,
        branch=shape.coordinates[segment],
        time=time,
        position=time if in_time else int(num_computed.sum()) + np.arange(len(time)),
        counts=counts,
        next_column=next_column,
        logits_indices=logits_indices,
        sampled_branches=segment[logits_indices] - 1,
        labels=_prompt_labels(group, segment, index),
    )


def _prompt_labels(group: SequenceGroup, segment: Ints, index: Ints) -> PromptLabels:
    """Prompt tokens that follow the scheduled ones, in branches that ask for their log-probabilities.

    segment, index: `[tokens]` segments of the scheduled tokens, and their indices there.
    """
    labels = [NO_LABELS]
    for branch in group.branches:
        if branch.scores_prompt:
            is_last = index == group.segments[branch.parent].num_tokens - 1
            is_before = is_last & (segment == branch.parent) & (not branch.is_reduce)
            own = np.flatnonzero((segment == branch.number) & (index < branch.num_prompt - 1))
            where = np.concatenate([np.flatnonzero(is_before), own])
            positions = np.where(segment[where] == branch.number, index[where] + 1, 0)
            labels.append(PromptLabels(where, np.full(len(where), branch.index), positions))
    return PromptLabels(*map(np.concatenate, zip(*labels, strict=True)))


def num_prefill(group: SequenceGroup, tokens: ScheduledTokens, progress: Progress) -> int:
    """How many of the scheduled tokens are of main, of prompts, or computed anew."""
    waiting = _per_segment(group.segments, "num_prefill") - progress.num_computed
    return int(np.minimum(tokens.counts, np.maximum(waiting, 0)).sum())


def _free_order_counts(group: SequenceGroup, budget: int, progress: Progress) -> Ints:
    """`[segments]` tokens to compute in free order: newest tokens, and prompts one after another."""
    segments, shape, num_computed = group.segments, group.shape, progress.num_computed
    left = _per_segment(segments, "num_tokens") - num_computed
    left[~group.is_needed] = 0  # such as the last token of a finished branch
    counts = np.where(num_computed < _per_segment(segments, "num_prefill"), 0, left)
    for number in np.flatnonzero(left > counts).tolist():
        before = [*shape.paths[number][:-1], *shape.joined[number]]
        if number not in progress.deferred and (left[before] <= counts[before]).all():
            counts[number] = min(left[number], budget)
            budget -= counts[number]
    return counts


def _column_order_counts(group: SequenceGroup, budget: int, progress: Progress) -> tuple[int, Ints]:
    """The column after those to compute, and the `[segments]` tokens of each segment in these columns."""
    segments, first = group.segments, progress.next_column
    if MAIN in progress.deferred:
        return first, np.zeros(len(segments), np.int64)
    starts = group.start_times
    ends = starts + _per_segment(segments, "num_tokens")
    stop = min(segment.end_time for segment in segments if segment.is_running)  # its token is not decoded yet
    if stop > first + 1:
        columns = np.arange(first, stop)
        in_column = ((columns >= starts[:, None]) & (columns < ends[:, None])).sum(axis=0)
        stop = first + max(1, int(np.searchsorted(np.cumsum(in_column), budget, side="right")))
    counts = np.minimum(ends, stop) - starts - progress.num_computed
    return stop, np.clip(counts, 0, None)


def _next_ids(segments: Sequence[SegmentState], num_computed: Ints, counts: Ints) -> Ints:
    """Token ids of the next `counts` tokens of each segment, segment after segment."""
    parts = (
        segment.token_ids[start : start + count]
        for segment, start, count in zip(segments, num_computed.tolist(), counts.tolist(), strict=True)
        if count
    )
    return np.fromiter(chain.from_iterable(parts), np.int64, int(counts.sum()))


def _per_segment(segments: Sequence[SegmentState], attribute: str) -> Ints:
    """`[segments]` values of an attribute of every segment."""
    return np.fromiter((getattr(segment, attribute) for segment in segments), np.int64, len(segments))
