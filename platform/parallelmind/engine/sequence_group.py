"""State of one sample while it is decoded: its segments, and how they relate to each other. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from parallelmind.config import RopeConfig
from parallelmind.engine.block_manager import blocks_for
from parallelmind.engine.output import OutputProcessor
from parallelmind.engine.path_hash import PathHash
from parallelmind.engine.request import TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.sequence import BranchState, SegmentState
from parallelmind.layout import Layout, Tokens, arrange, is_free_order, start_times
from parallelmind.tree import MAIN, NO_PARENT, Ints, Mask, Tree, relations
from parallelmind.visibility import relation_scores

OutputFactory = Callable[[Sequence[int], SamplingParams], OutputProcessor]  # given a branch's prompt


class SequenceGroup:
    """A sample in the engine, from its submission to its end.

    id: the engine's number of the sample.
    adapter_version: version of the adapter that decodes it.
    free_order: whether branches are stored and scheduled regardless of their siblings' progress.
    segments: main and all branches, in the order in which they were added.
    main: `[main tokens]` token ids.
    reduce: the reduce branch, until it starts. reduce_started: it is the last one of `branches`.
    next_column: the first column of time that is not in the cache (unless the order is free).
    frontier: the first column that no forward pass has computed or is computing; a branch that is added
        starts there.
    is_admitted: whether the sample is running and may hold cache blocks.
    is_finite: whether all logits were finite so far.
    num_preemptions: how often its blocks were taken from it.
    """

    def __init__(
        self,
        request: TokenizedRequest,
        config: RopeConfig,
        make_output: OutputFactory,
        *,
        id: int = 0,
        adapter_version: str = "",
        seed: int = 0,
    ) -> None:
        """seed: for branches whose sampling parameters have none."""
        self.id, self.adapter_version = id, adapter_version
        self.config, self.free_order = config, is_free_order(config)
        self.reduce, self.reduce_started = request.reduce, False
        self._seed, self._make_output = seed, make_output
        self.next_column = self.frontier = self.num_preemptions = 0
        self.is_admitted, self.is_finite = False, True
        self._shape: GroupShape | None = None
        self.submitted_at = monotonic()

        tokens = request.tokens
        main, *prompts = tokens.split()
        self.main = np.array(main, dtype=np.int64)
        self.segments = [SegmentState(MAIN, main, path=PathHash.root(adapter_version))]
        starts = start_times(tokens.lengths, tokens.tree, config.align_to)[1:].tolist()
        for prompt, params, start in zip(prompts, request.params, starts, strict=True):
            self._append_branch(prompt, params, start)

    # Progress

    @property
    def branches(self) -> list[BranchState]:
        """All segments but main."""
        return self.segments[1:]  # type: ignore[return-value]

    @property
    def is_running(self) -> bool:
        """Whether any branch runs. The reduce branch counts once it has started."""
        return any(segment.is_running for segment in self.segments)

    @property
    def is_decoding(self) -> bool:
        """Whether any branch decodes."""
        return any(segment.is_decoding for segment in self.segments)

    @property
    def running_branches(self) -> list[BranchState]:
        return [branch for branch in self.branches if branch.is_running]

    @property
    def is_needed(self) -> Mask:
        """`[segments]` whether a running branch reads the segment, or its place in the columns counts."""
        is_running = np.array([segment.is_running for segment in self.segments])
        if not self.free_order:
            return np.ones_like(is_running)
        is_needed: Mask = self.shape.reads[is_running].any(axis=0)
        return is_needed

    @property
    def num_waiting_prefill(self) -> int:
        """Tokens that are still to be computed before all running branches decode."""
        waiting = [segment.num_waiting_prefill for segment in self.segments]
        return int(self.is_needed @ waiting) if any(waiting) else 0

    # Shape

    @property
    def shape(self) -> GroupShape:
        """How the segments relate to each other, as they are now."""
        if self._shape is None:
            self._shape = GroupShape.of(self.segments, self.config)
        return self._shape

    @property
    def tree(self) -> Tree:
        """The tree of the sample as it is now, in pre-order."""
        return self.shape.tree

    def pos2d(self, branch: BranchState, index: int = 0) -> tuple[int, int]:
        """Branch and time coordinates of a branch's token, counted from the first token of its prompt."""
        return branch.coordinate, branch.start_time + index

    def final_layout(self) -> Layout:
        """Layout of main and of all branches as they are now, each at its start time and coordinate."""
        tree, order = self.tree, self.shape.order
        segments = [self.segments[number] for number in order]
        tokens = Tokens.of_tree([segment.token_ids for segment in segments], tree)
        delays = [
            segment.start_time - self.segments[segment.parent].end_time
            for segment in segments[1:]
            if not segment.is_reduce
        ]
        aligned_left = self.config.model_copy(update={"align_to": "left"})
        layout = arrange(tokens, aligned_left, delays=np.array(delays))
        coordinates = np.array([segment.coordinate for segment in segments])
        return replace(layout, branch=coordinates[layout.segment])

    # Branches

    def add_branch(self, token_ids: Sequence[int], params: SamplingParams) -> BranchState:
        """Add a branch. It starts where alignment puts it, or, in column order, in the next column."""
        return self._append_branch(token_ids, params, self.next_start_time(len(token_ids)))

    def set_start_times(self, start_times: Sequence[int]) -> None:
        """Move the branches of a new sample to the start times that they had on another engine."""
        for branch, start_time in zip(self.branches, start_times, strict=True):
            branch.start_time = start_time
            branch.path = self._path_of(branch)
        self._shape = None

    def start_reduce(self) -> BranchState:
        """Start the reduce branch at the latest end of all other branches."""
        assert self.reduce is not None, "the sample has a reduce branch that has not started"
        spec, self.reduce = self.reduce, None
        start = max(branch.end_time for branch in self.branches)
        self.reduce_started = True
        return self._append_branch(spec.token_ids, spec.params, start, is_reduce=True)

    def next_start_time(self, num_tokens: int) -> int:
        """Time coordinate at which a branch with this many prompt tokens starts, if it is added now."""
        if not self.free_order:
            return max(len(self.main), self.frontier)
        if self.config.align_to == "left":
            return len(self.main)
        longest = max(branch.num_prompt for branch in self.branches)
        return len(self.main) + max(longest - num_tokens, 0)

    def _append_branch(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        start: int,
        parent: int = MAIN,
        is_reduce: bool = False,
    ) -> BranchState:
        branch = BranchState(
            number=len(self.segments),
            token_ids=list(token_ids),
            start_time=start,
            parent=parent,
            is_reduce=is_reduce,
            coordinate=self._coordinate(len(self.segments), parent, is_reduce),
            params=params,
            seed=self._seed if params.seed is None else params.seed,
            output=self._make_output(token_ids, params),
        )
        branch.path = self._path_of(branch)
        self.segments.append(branch)
        self._shape = None
        return branch

    def _coordinate(self, number: int, parent: int, is_reduce: bool) -> int:
        """The branch coordinate of a new segment: that of its parent for a reduce, as in `tree`."""
        if is_reduce:
            return self.segments[parent].coordinate
        return (number - (len(self.main) == 0)) * self.config.branch_stride

    def _path_of(self, branch: BranchState) -> PathHash | None:
        """The hash at the start of a branch; None if its keys depend on more than its path."""
        parent = self.segments[branch.parent]
        if parent.path is None or branch.is_reduce or not self.free_order:
            return None
        coordinate = branch.coordinate if self.config.rope_2d_ratio else 0
        return parent.path.child(parent.token_ids, coordinate, branch.start_time)

    # Cache blocks

    def is_kept(self, segment: SegmentState) -> bool:
        """Whether the blocks of a segment are read, now or later.

        In column order the blocks of main hold all segments.
        """
        waits_for_reduce = self.reduce is not None or self.reduce_started
        return segment.number == MAIN or segment.is_running or (self.free_order and waits_for_reduce)

    @property
    def max_reduce_tokens(self) -> int:
        """Upper bound of the length of a reduce branch that has not started."""
        return len(self.reduce.token_ids) + self.reduce.params.max_new_tokens if self.reduce else 0

    @property
    def max_blocks(self) -> int:
        """Upper bound of the blocks that the sample fills, if it adopts no blocks that are used in part."""
        return self.max_blocks_with(0)

    def max_blocks_with(self, new_tokens: int) -> int:
        """`max_blocks` with one more branch of so many tokens."""
        reduce = self.max_reduce_tokens
        if not self.free_order:
            return blocks_for(sum(segment.max_tokens for segment in self.segments) + reduce + new_tokens)
        kept = (segment.max_tokens for segment in self.segments if self.is_kept(segment))
        return sum(map(blocks_for, [*kept, reduce, new_tokens]))

    def reset(self) -> list[int]:
        """Forget what is computed, so that it is computed anew; returns all blocks."""
        self.is_admitted, self.next_column = False, 0
        return [block for segment in self.segments for block in segment.reset()]


@dataclass(frozen=True, eq=False)
class GroupShape:
    """How the segments of a sample relate to each other.

    Segments are numbered in the order in which they were added; a tree numbers them in pre-order.

    tree: the tree of the sample. order: `[segments]` the segment with each number of the tree.
    scores: `[segments, segments]` summand of the attention score for a query's and a key's segment.
    coordinates, start_times: `[segments]` values of the segments.
    reads: `[segments, segments]` whether a query's segment sees a key's segment.
    paths: for each segment the segments from main to itself.
    joined: for each segment those that it joins.
    """

    tree: Tree
    order: list[int]
    scores: NDArray[np.float32]
    reads: Mask
    coordinates: Ints
    start_times: Ints
    paths: list[tuple[int, ...]]
    joined: list[tuple[int, ...]]

    @staticmethod
    def of(segments: Sequence[SegmentState], config: RopeConfig) -> GroupShape:
        order = _pre_order(segments)
        number = np.argsort(order)  # in the tree, of each segment
        parents = [NO_PARENT, *(number[segments[index].parent] for index in order[1:])]
        tree = Tree(np.array(parents, np.int64), np.array([segments[index].is_reduce for index in order]))
        table = relations(tree)[np.ix_(number, number)]
        scores = relation_scores(config.visibility, config.sibling_penalty)[table]
        paths: list[tuple[int, ...]] = [(MAIN,)]
        for segment in segments[1:]:
            paths.append((*paths[segment.parent], segment.number))
        joined: list[tuple[int, ...]] = [()] * len(segments)
        for place, _, joins in tree.walk():
            joined[order[place]] = tuple(order[joins.start : joins.stop])
        return GroupShape(
            tree=tree,
            order=order,
            scores=scores,
            reads=scores > -np.inf,
            coordinates=np.array([segment.coordinate for segment in segments]),
            start_times=np.array([segment.start_time for segment in segments]),
            paths=paths,
            joined=joined,
        )


def _pre_order(segments: Sequence[SegmentState]) -> list[int]:
    """The numbers of the segments in pre-order, siblings in the order in which they were added."""
    children: list[list[int]] = [[] for _ in segments]
    for segment in segments[1:]:
        children[segment.parent].append(segment.number)
    order, open_segments = list[int](), [MAIN]
    while open_segments:
        order.append(open_segments.pop())
        open_segments += reversed(children[order[-1]])
    return order
