"""State of one sample while it is decoded: its segments, and how they relate to each other. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from parallelmind.config import RopeConfig
from parallelmind.engine.block_manager import blocks_for
from parallelmind.engine.output import FinishReason, OutputProcessor
from parallelmind.engine.path_hash import PathHash
from parallelmind.engine.request import ResumeState, TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.sequence import BranchState, SegmentState
from parallelmind.layout import Layout, Tokens, branch_shifts, is_free_order, place
from parallelmind.tree import MAIN, GrowingTree, Ints, Mask, branch_coordinates, relations
from parallelmind.visibility import effective_penalty, relation_scores

OutputFactory = Callable[[Sequence[int], SamplingParams], OutputProcessor]  # given a branch's prompt


class SequenceGroup:
    """A sample in the engine, from its submission to its end.

    id: the engine's number of the sample.
    adapter_version: version of the adapter that decodes it.
    branch_number: as in `TokenizedRequest`.
    num_documents: documents, which are the first segments after main.
    free_order: whether branches are stored and scheduled regardless of their siblings' progress.
    segments: main, branches and reduces, in the order in which they were added: that of their numbers.
    main: `[main tokens]` token ids.
    next_column: the first column of time that is not in the cache (unless the order is free).
    frontier: the first column that no forward pass has computed or is computing; a branch that is added
        starts there.
    is_admitted: whether the sample is running and may hold cache blocks.
    is_finite: whether all logits were finite so far. If not, the sample shares no blocks with others.
    has_adopted: whether the sample reads blocks that another one has computed.
    has_sought_documents, has_noted_documents: whether its documents were looked for elsewhere in the cache
        and in a folder, and whether they can be found there by others.
    num_preemptions: how often its blocks were taken from it.
    version: changes whenever segments are added, start or end, and when all of them lose their blocks.
    submitted_at: `time.monotonic` of the submission. waits_since_step: number of the engine's steps when the
        sample began to wait.
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
        self.branch_number, self.num_documents = request.branch_number, request.num_documents
        self.config = config if self.branch_number is None else _independent(config)
        self.free_order = is_free_order(self.config)
        self._seed, self._make_output = seed, make_output
        self.next_column = self.frontier = self.num_preemptions = self.waits_since_step = self.version = 0
        self.is_admitted, self.is_finite, self.has_adopted = False, True, False
        self.has_sought_documents = self.has_noted_documents = False
        self.frequency_limit: int | None = None
        self.has_long_frequencies = False
        self._shape: GroupShape | None = None
        self._start_times: Ints | None = None
        self._is_kept: Mask | None = None
        self.submitted_at = monotonic()

        main = request.tokens.split()[MAIN]
        self.main = np.array(main, dtype=np.int64)
        self.segments = [SegmentState(MAIN, main, path=PathHash.root(adapter_version))]
        self.add(request)

    # Progress

    @property
    def branches(self) -> list[BranchState]:
        """All segments but main."""
        return self.segments[1:]  # type: ignore[return-value]

    @property
    def documents(self) -> list[BranchState]:
        """The documents, which are only read."""
        return self.branches[: self.num_documents]

    @property
    def is_running(self) -> bool:
        """Whether any segment runs or waits for its start."""
        return not all(segment.is_finished for segment in self.segments)

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
            self._shape = GroupShape.of(self.segments, self.config, self.branch_number, self.num_documents)
        return self._shape

    @property
    def tree(self) -> GrowingTree:
        """The tree of the sample as it is now."""
        return self.shape.tree

    @property
    def start_times(self) -> Ints:
        """`[segments]` time coordinates of the first tokens; 0 for a segment that waits for its start."""
        if self._start_times is None:
            self._start_times = np.array([segment.start_time for segment in self.segments])
        return self._start_times

    def num_adoptable(self) -> list[int]:
        """`[segments]` number of first tokens without needed logits, which cached blocks may hold."""
        counts = [segment.num_tokens - segment.is_running for segment in self.segments]
        for branch in self.branches:
            if branch.scores_prompt:
                counts[branch.number] = 0
                counts[branch.parent] = min(
                    counts[branch.parent], self.segments[branch.parent].num_tokens - 1
                )
        return counts

    def pos2d(self, branch: BranchState, index: int = 0) -> tuple[int, int]:
        """Branch and time coordinates of a branch's token, counted from the first token of its prompt."""
        return int(self.shape.coordinates[branch.number]), branch.start_time + index

    def draw_index(self, branch: BranchState) -> int:
        """The number of a branch of which its random draws are a function."""
        return branch.index if self.branch_number is None else self.shape.ranks[branch.number]

    def path_tokens(self, branch: BranchState) -> list[int]:
        """Token ids of main and of all that the branch continues, its own last."""
        path: list[SegmentState] = [branch]
        while path[-1].number != MAIN:
            path.append(self.segments[path[-1].parent])
        return [token for segment in reversed(path) for token in segment.token_ids]

    def final_layout(self) -> Layout:
        """Layout of all segments as they are now; one that has not started has no token."""
        lengths = np.array([segment.num_tokens for segment in self.segments])
        ids = np.array([token for segment in self.segments for token in segment.token_ids], np.int64)
        tokens = Tokens(ids, lengths, np.zeros(len(ids), bool), self.tree)
        return place(tokens, self.start_times, self.config)

    # Growth

    def add(self, request: TokenizedRequest, parent: int = MAIN, as_reduce: bool = False) -> None:
        """Add the segments of a request, without its main, below a segment. They start with `start_ready`.

        as_reduce: whether its only branch is added as the reduce of the segment.
        """
        tokens, last = request.tokens, len(self.segments) - 1
        parents, is_reduce = tokens.tree.parents.tolist(), tokens.tree.is_reduce.tolist()
        context = self._output_context()
        for number, (prompt, params) in enumerate(zip(tokens.split()[1:], request.params, strict=True), 1):
            is_below = parents[number] != MAIN
            branch = BranchState(
                number=last + number,
                prompt=prompt,
                parent=last + parents[number] if is_below else parent,
                is_reduce=is_reduce[number] or (as_reduce and not is_below),
                params=params,
                seed=self._seed if params.seed is None else params.seed,
                output=self._make_output([*context, *prompt], params),
            )
            self.segments.append(branch)
        self._forget_shape()

    def remove_from(self, number: int) -> None:
        """Remove the segments from this number on. None of them has started."""
        del self.segments[number:]
        self._forget_shape()

    def start_ready(self) -> list[BranchState]:
        """Start every segment whose start time is known; returns them.

        A branch starts when its parent has ended, a reduce when the branches of its parent, and all below
        them, have.
        """
        waiting = [branch for branch in self.branches if not (branch.has_started or branch.is_finished)]
        if not waiting:
            return []
        is_open = self._is_open()
        ready = [branch for branch in waiting if self._is_ready(branch, is_open)]
        ends = np.array([segment.end_time for segment in self.segments])
        for branch in ready:
            self.start(branch, self._start_time(branch, ends))
        return ready

    def start(self, branch: BranchState, time: int) -> None:
        """Start a segment at this time coordinate."""
        branch.start(time, self._path_at(branch, time))
        self._start_times = None
        self.version += 1

    def finish(self, branch: BranchState, reason: FinishReason | None) -> None:
        """Finish a segment, which may wait for its start. None: let it run on."""
        branch.finish_reason = reason
        self._is_kept = None
        self.version += 1

    def resume(self, state: ResumeState) -> None:
        """Bring a new sample to the progress that it had on another engine."""
        for branch, time, token_ids, reason in zip(
            self.branches, state.start_times, state.token_ids, state.finish_reasons, strict=True
        ):
            if time is not None:
                self.start(branch, time)
                branch.append_tokens(token_ids, finished=reason is not None)
            if reason is not None:
                self.finish(branch, reason)

    def below(self, number: int) -> list[BranchState]:
        """The segments below a segment."""
        return [branch for branch in self.branches if number in self.shape.paths[branch.number][:-1]]

    def children(self, number: int) -> list[BranchState]:
        """The branches of a segment, and its reduce."""
        return [branch for branch in self.branches if branch.parent == number]

    def reduce_of(self, number: int) -> BranchState | None:
        """The reduce of a segment."""
        return next((branch for branch in self.children(number) if branch.is_reduce), None)

    def has_open_branches(self, number: int) -> bool:
        """Whether a branch of a segment, or something below it, has not finished."""
        is_open = self._is_open()
        return any(is_open[branch.number] for branch in self.children(number) if not branch.is_reduce)

    def choose_frequencies(self, limit: int, may_exceed: bool) -> None:
        """Choose rotary frequencies by the sample's largest length. Call before the first branch starts.

        limit: positions above which a model has other frequencies. may_exceed: whether it can use them.
        """
        self.frequency_limit = limit
        self.has_long_frequencies = may_exceed and self.max_positions(self.latest_ends()) > limit
        self.segments[MAIN].path = self.root_path(self.adapter_version)

    def root_path(self, adapter_version: str) -> PathHash:
        """The hash of a path that begins with main."""
        return PathHash.root(f"{adapter_version} long" if self.has_long_frequencies else adapter_version)

    def max_positions(self, latest_ends: Ints) -> int:
        """Upper bound of the positions of the sample. latest_ends: those of its segments."""
        if self.config.positions == "flat":
            return sum(segment.max_tokens for segment in self.segments)
        return int(latest_ends.max())

    def latest_ends(self) -> Ints:
        """`[segments]` upper bounds of the time coordinates after the last token."""
        ends, branches = np.full(len(self.segments), len(self.main)), self.branches
        for number in self.tree.pre_order[1:].tolist():
            branch = branches[number - 1]
            start = branch.start_time if branch.has_started else self._start_time(branch, ends)
            ends[number] = start + branch.max_tokens
        return ends

    def _is_open(self) -> list[bool]:
        """`[segments]` whether a segment, or one below it, has not finished."""
        is_open = [not segment.is_finished for segment in self.segments]
        for branch in reversed(self.branches):
            is_open[branch.parent] |= is_open[branch.number]
        return is_open

    def _is_ready(self, branch: BranchState, is_open: Sequence[bool]) -> bool:
        if not self.segments[branch.parent].is_finished:
            return False
        siblings = self.children(branch.parent) if branch.is_reduce else []
        return not any(is_open[sibling.number] for sibling in siblings if not sibling.is_reduce)

    def _start_time(self, branch: BranchState, ends: Ints) -> int:
        """Where a segment starts if the others end at these times.

        In column order, not in a column that is computed or is being computed.
        """
        if branch.is_reduce:
            start = int(ends[[branch.parent, *self.shape.joined[branch.number]]].max())
        else:
            start = int(ends[branch.parent] + self.shape.shifts[branch.number])
        return start if self.free_order else max(start, self.frontier)

    def _output_context(self) -> list[int]:
        """The text of main, if a branch continues it."""
        return self.main.tolist() if self.branch_number == 0 else []

    def _forget_shape(self) -> None:
        self._shape = self._start_times = self._is_kept = None
        self.version += 1

    def _path_at(self, branch: BranchState, time: int) -> PathHash | None:
        """The hash at the start of a branch; None if its keys depend on more than its path."""
        parent = self.segments[branch.parent]
        if parent.path is None or branch.is_reduce or not self.free_order:
            return None
        if branch.number <= self.num_documents:
            return self.document_path(self.adapter_version, branch.number, time)
        return parent.path.child(parent.token_ids, self.path_coordinate(branch.number), time)

    def document_path(self, adapter_version: str, number: int, start_time: int) -> PathHash:
        """The hash at the start of a document, which reads nothing before it."""
        return self.root_path(adapter_version).child([], self.path_coordinate(number), start_time)

    def path_coordinate(self, number: int) -> int:
        """The branch coordinate of a segment as hashes of paths take it: 0 where keys do not depend on it."""
        is_read = self.config.rope_2d_ratio or self.config.branch_embeddings
        return int(self.shape.coordinates[number]) if is_read else 0

    # Cache blocks

    @property
    def is_kept(self) -> Mask:
        """`[segments]` whether the blocks of a segment are read, now or later.

        In column order the blocks of main hold all segments.
        """
        if self._is_kept is None:
            is_open = np.array([not segment.is_finished for segment in self.segments])
            self._is_kept = is_open | (self.shape.reads[is_open].any(axis=0) & self.free_order)
            self._is_kept[MAIN] = True
        return self._is_kept

    @property
    def num_partial(self) -> int:
        """Cached blocks that segments use in part."""
        return sum(segment.table.num_partial for segment in self.segments)

    @property
    def max_blocks(self) -> int:
        """Upper bound of the blocks that the sample fills, if it adopts no blocks that are used in part."""
        if not self.free_order:
            return blocks_for(sum(segment.max_tokens for segment in self.segments))
        return sum(
            blocks_for(segment.max_tokens)
            for segment, is_kept in zip(self.segments, self.is_kept.tolist(), strict=True)
            if is_kept
        )

    @property
    def missing_blocks(self) -> int:
        """Blocks that the sample needs for its known tokens and one more of each running branch."""
        kept = [segment for segment in self.segments if self.is_kept[segment.number] or not self.free_order]
        tokens = [segment.num_tokens + segment.is_running for segment in kept]
        needed = sum(map(blocks_for, tokens)) if self.free_order else blocks_for(sum(tokens))
        held = sum(len(segment.table.blocks) - segment.table.num_partial for segment in kept)
        return max(needed - held, 0)

    def reset(self) -> list[int]:
        """Forget what is computed, so that it is computed anew; returns all blocks."""
        self.is_admitted, self.next_column = False, 0
        self.version += 1
        return [block for segment in self.segments for block in segment.reset()]


@dataclass(frozen=True, eq=False)
class GroupShape:
    """How the segments of a sample relate to each other.

    tree: the tree of the sample.
    scores: `[segments, segments]` summand of the attention score for a query's and a key's segment.
    coordinates: `[segments]` branch coordinates.
    reads: `[segments, segments]` whether a query's segment sees a key's segment.
    paths: for each segment the segments from main to itself.
    joined: for each segment those that it joins.
    ranks: for each segment its number among those of its branch of main, which has 0.
    shifts: `[segments]` time steps between the end of the parent and the start of a branch.
    """

    tree: GrowingTree
    scores: NDArray[np.float32]
    coordinates: Ints
    reads: Mask
    paths: list[tuple[int, ...]]
    joined: list[tuple[int, ...]]
    ranks: list[int]
    shifts: Ints

    @staticmethod
    def of(
        segments: Sequence[SegmentState],
        config: RopeConfig,
        branch_number: int | None = None,
        num_documents: int = 0,
    ) -> GroupShape:
        tree = GrowingTree(
            np.array([segment.parent for segment in segments]),
            np.array([segment.is_reduce for segment in segments]),
            num_documents,
        )
        scores = relation_scores(config.visibility, effective_penalty(config))[relations(tree)]
        paths: list[tuple[int, ...]] = [(MAIN,)]
        for segment in segments[1:]:
            paths.append((*paths[segment.parent], segment.number))
        joined: list[tuple[int, ...]] = [()] * len(segments)
        coordinates = branch_coordinates(tree, segments[MAIN].num_tokens > 0, config.branch_stride)
        ranks = _ranks(paths)
        if branch_number is not None:
            coordinates = _independent_coordinates(tree, ranks, branch_number) * config.branch_stride
        prompts = np.array([segment.num_prompt for segment in segments])
        order = tree.pre_order.tolist()
        for number, _, joins in tree.complete().walk():
            joined[order[number]] = tuple(order[joins.start : joins.stop])
        return GroupShape(
            tree=tree,
            scores=scores,
            coordinates=coordinates,
            reads=scores > -np.inf,
            paths=paths,
            joined=joined,
            ranks=ranks,
            shifts=branch_shifts(prompts, tree, config.align_to),
        )


def _ranks(paths: Sequence[tuple[int, ...]]) -> list[int]:
    """`[segments]` numbers of the segments among those of their branch of main; 0 for main."""
    counts = Counter[int]()
    ranks = [0]
    for path in paths[1:]:
        ranks.append(counts[path[1]])
        counts[path[1]] += 1
    return ranks


def _independent_coordinates(tree: GrowingTree, ranks: Sequence[int], branch_number: int) -> Ints:
    """`[segments]` numbers of independent branches, and of what each is followed by, as if it were alone."""
    numbers = branch_number + np.array(ranks)
    numbers[MAIN] = 0
    for reduce in np.flatnonzero(tree.is_reduce):
        numbers[reduce] = numbers[tree.parents[reduce]]
    return numbers


@lru_cache(maxsize=16)
def _independent(config: RopeConfig) -> RopeConfig:
    """The settings of independent branches, with which a single branch is decoded as with `config`."""
    return config.model_copy(update={"visibility": "isolated", "positions": "time", "align_to": "left"})
