"""The next tokens of samples that only decode, chosen for all of them together. NumPy only.

They are the tokens that `token_scheduler` chooses for each sample. Most steps compute nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from parallelmind.engine.sequence import ScheduledTokens, SegmentState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.tree import Ints


class DecodeTokens(NamedTuple):
    """The newest token of each running branch of a sample.

    segments: the branches. slots: `[tokens]`; that of a branch without a free slot is not valid.
    """

    segments: list[SegmentState]
    tokens: ScheduledTokens
    slots: Ints


def only_decodes(group: SequenceGroup) -> bool:
    """Whether a sample, in free order, has nothing to compute but the newest tokens of its branches."""
    if not group.free_order:
        return False
    is_behind = False
    for segment in group.segments:
        num_left = len(segment.token_ids) - segment.num_computed
        if not segment.is_running:
            is_behind |= num_left > 0
        elif num_left != 1 or segment.num_computed < segment.num_prefill:
            return False
    return not is_behind or not _is_read(group)


def _is_read(group: SequenceGroup) -> bool:
    """Whether a running branch reads a token of a finished one that is still to be computed."""
    is_needed = group.is_needed.tolist()
    return any(
        needed and not segment.is_running and segment.num_computed < segment.num_tokens
        for needed, segment in zip(is_needed, group.segments, strict=True)
    )


def decode_tokens(groups: Sequence[SequenceGroup]) -> list[DecodeTokens]:
    """The next tokens of samples of which `only_decodes` is true."""
    running = [[segment for segment in group.segments if segment.is_running] for group in groups]
    segments = [segment for branches in running for segment in branches]
    rows = [(s.token_ids[-1], s.number, s.start_time + s.num_computed, s.table.next_slot) for s in segments]
    ids, number, time, slots = np.array(rows, np.int64).reshape(-1, 4).T.copy()
    index = np.arange(max(map(len, running), default=0))
    planned = []
    bounds = pairwise(accumulate(map(len, running), initial=0))
    for group, branches, (start, end) in zip(groups, running, bounds, strict=True):
        own = slice(start, end)
        tokens = ScheduledTokens(
            ids=ids[own],
            segment=number[own],
            branch=group.shape.coordinates[number[own]],
            time=time[own],
            position=time[own],
            counts=np.bincount(number[own], minlength=len(group.segments)),
            next_column=0,
            logits_indices=index[: len(branches)],
            sampled_branches=number[own] - 1,
        )
        planned.append(DecodeTokens(branches, tokens, slots[own]))
    return planned
