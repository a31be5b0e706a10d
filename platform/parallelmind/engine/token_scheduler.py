"""Which tokens of one sample the next step computes. NumPy only.

A cached step must compute exactly what one full forward pass over the final tokens computes. That decides the
order in which tokens may enter the cache:

- *Free order* (`layout.is_free_order`): nothing depends on the siblings' progress. Prompts are computed as
  fast as the budget allows, and every step computes the newest token of each decoding branch.
- *Column order*: tokens enter by columns of time. The first steps compute the columns before the one in which
  a branch decodes its first token. From then on each step computes one column, with the token that each
  branch has there: the next token of a longer prompt, which may attend to (or be counted after) a token that
  a shorter sibling has just decoded; the newest token; or the last token of a finished branch, which running
  siblings may still attend to. A branch that is added late starts in the next column, because the keys and
  values of earlier columns are final.
"""

from __future__ import annotations

from itertools import chain

import numpy as np

from parallelmind.engine.sequence import BranchState, ScheduledTokens
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.tree import Ints


def schedule_tokens(group: SequenceGroup, budget: int) -> ScheduledTokens:
    """Choose the next tokens of a running sample and count them as computed.

    budget: prompt tokens to compute at most. Column order computes at least one column. The newest
        tokens of decoding branches are always chosen.
    """
    branches = group.branches
    if group.free_order:
        num_main = min(len(group.main) - group.num_main_computed, budget)
        counts = _free_order_counts(group, budget)
    else:
        group.next_column, counts = _column_order_counts(group, budget)
        num_main = max(min(len(group.main), group.next_column) - group.num_main_computed, 0)
    num_computed = _per_branch(branches, "num_computed")
    scheduled = _gather(group, num_main, counts, num_computed)
    group.num_main_computed += num_main
    for branch, count in zip(branches, counts.tolist(), strict=True):
        branch.num_computed += count
    return scheduled


def _gather(group: SequenceGroup, num_main: int, counts: Ints, num_computed: Ints) -> ScheduledTokens:
    """The next `num_main` tokens of main and the next `counts` tokens of each branch, in physical order."""
    branches, config = group.branches, group.config
    main = np.arange(group.num_main_computed, group.num_main_computed + num_main)
    of_branch = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(of_branch)) + np.repeat(num_computed - np.cumsum(counts) + counts, counts)
    segment = np.concatenate([np.zeros_like(main), of_branch + 1])
    time = np.concatenate([main, _per_branch(branches, "start_time")[of_branch] + index])
    ids = np.concatenate([group.main[main], _next_ids(branches, counts)])
    is_last = index == _per_branch(branches, "num_tokens")[of_branch] - 1
    needs_logits = np.concatenate(
        [np.zeros(num_main, bool), _per_branch(branches, "is_running").astype(bool)[of_branch] & is_last]
    )
    if not group.free_order:
        order = np.lexsort((segment, time))
        segment, time, ids, needs_logits = segment[order], time[order], ids[order], needs_logits[order]
    num_before = group.num_main_computed + int(num_computed.sum())
    logits_indices = np.flatnonzero(needs_logits)
    return ScheduledTokens(
        ids=ids,
        segment=segment,
        branch=group.branch_coordinates[segment],
        time=time,
        position=time if config.positions == "time" else num_before + np.arange(len(time)),
        logits_indices=logits_indices,
        sampled_branches=segment[logits_indices] - 1,
    )


def _free_order_counts(group: SequenceGroup, budget: int) -> Ints:
    """`[branches]` tokens to compute in free order: newest tokens, and prompts one after another."""
    branches = group.branches
    num_computed = _per_branch(branches, "num_computed")
    left = _per_branch(branches, "num_tokens") - num_computed
    if not (group.reduce_started and branches[-1].is_running):
        # No branch attends to the last token of a finished branch.
        left[_per_branch(branches, "is_running") == 0] = 0
    budget -= len(group.main) - group.num_main_computed
    if budget < 0:
        return np.zeros_like(left)
    prompts = np.where(num_computed < _per_branch(branches, "num_prefill"), left, 0)
    before = np.cumsum(prompts) - prompts
    return np.where(prompts > 0, np.clip(budget - before, 0, prompts), left)


def _column_order_counts(group: SequenceGroup, budget: int) -> tuple[int, Ints]:
    """The column after those to compute, and the `[branches]` tokens of each branch in these columns."""
    branches, first = group.branches, group.next_column
    starts = _per_branch(branches, "start_time")
    ends = starts + _per_branch(branches, "num_tokens")
    stop = min(branch.end_time for branch in branches if branch.is_running)  # its token is not decoded yet
    if stop > first + 1:
        columns = np.arange(first, stop)
        in_column = (columns < len(group.main)).astype(np.int64)
        in_column += ((columns >= starts[:, None]) & (columns < ends[:, None])).sum(axis=0)
        stop = first + max(1, int(np.searchsorted(np.cumsum(in_column), budget, side="right")))
    counts = np.minimum(ends, stop) - starts - _per_branch(branches, "num_computed")
    return stop, np.clip(counts, 0, None)


def _next_ids(branches: list[BranchState], counts: Ints) -> Ints:
    """Token ids of the next `counts` tokens of each branch, branch after branch."""
    parts = (
        branch.token_ids[branch.num_computed : branch.num_computed + count]
        for branch, count in zip(branches, counts.tolist(), strict=True)
    )
    return np.fromiter(chain.from_iterable(parts), np.int64, int(counts.sum()))


def _per_branch(branches: list[BranchState], attribute: str) -> Ints:
    """`[branches]` values of an attribute of every branch."""
    return np.fromiter((getattr(branch, attribute) for branch in branches), np.int64, len(branches))
