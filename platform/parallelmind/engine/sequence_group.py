"""State of one sample while it is decoded: main, its branches, and their cache blocks. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from parallelmind.config import RopeConfig
from parallelmind.engine.block_manager import BLOCK, BlockTable, blocks_for
from parallelmind.engine.output import OutputProcessor
from parallelmind.engine.request import TokenizedRequest
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.sequence import BranchState, ScheduledTokens
from parallelmind.layout import Layout, Tokens, arrange, is_free_order, start_times
from parallelmind.tree import MAIN, Ints, Tree, branch_coordinates

OutputFactory = Callable[[Sequence[int], SamplingParams], OutputProcessor]  # given a branch's prompt


class SequenceGroup:
    """A sample in the engine, from its submission to its end.

    id: the engine's number of the sample.
    adapter_version: version of the adapter that decodes it.
    free_order: whether branches are stored and scheduled regardless of their siblings' progress.
    main: `[main tokens]` token ids.
    reduce: the reduce branch, until it starts. reduce_started: it is the last one of `branches`.
    num_main_computed: tokens of main that a step has computed or is computing, or that were in the cache.
    next_column: the first column of time that no step has computed (unless the order is free).
    block_table: blocks of main and, unless the order is free, of all branches; None until admission.
    prefix_keys: keys of main's full blocks.
    num_cached_blocks: leading blocks of main that other samples can reuse.
    reduce_blocks: blocks that are reserved for the reduce branch (free order).
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
        self.reduce = request.reduce
        self._seed, self._make_output = seed, make_output

        tokens = request.tokens
        main, *prompts = tokens.split()
        self.main = np.array(main, dtype=np.int64)
        self.branches: list[BranchState] = []
        starts = start_times(tokens.lengths, tokens.tree, config.align_to)[1:].tolist()
        for prompt, params, start in zip(prompts, request.params, starts, strict=True):
            self._append_branch(prompt, params, start)
        self.reduce_started = False
        self.num_main_computed = self.next_column = 0

        self.block_table: BlockTable | None = None
        self.prefix_keys: list[bytes] = []
        self.num_cached_blocks = 0
        self.reduce_blocks: list[int] = []

    # Progress

    @property
    def is_running(self) -> bool:
        """Whether any branch runs. The reduce branch counts once it has started."""
        return any(branch.is_running for branch in self.branches)

    @property
    def is_decoding(self) -> bool:
        """Whether any branch decodes."""
        return any(branch.is_decoding for branch in self.branches)

    @property
    def running_branches(self) -> list[BranchState]:
        return [branch for branch in self.branches if branch.is_running]

    @property
    def tree(self) -> Tree:
        """The shape of the sample as it is now."""
        return Tree.flat(len(self.branches) - self.reduce_started, self.reduce_started)

    @property
    def branch_coordinates(self) -> Ints:
        """`[segments]` branch coordinate of main and of every branch."""
        return branch_coordinates(self.tree, len(self.main) > 0, self.config.branch_stride)

    @property
    def num_waiting_prefill(self) -> int:
        """Tokens of main and of running branches that are still to be computed before all of them decode."""
        branches = (max(branch.num_prefill - branch.num_computed, 0) for branch in self.running_branches)
        return len(self.main) - self.num_main_computed + sum(branches)

    @property
    def num_prefill_computed(self) -> int:
        """Prefill tokens that are computed, those of finished branches included."""
        branches = (min(branch.num_computed, branch.num_prefill) for branch in self.branches)
        return self.num_main_computed + sum(branches)

    # Branches

    def add_branch(self, token_ids: Sequence[int], params: SamplingParams) -> BranchState:
        """Add a branch. It starts where alignment puts it, or, in column order, in the next column."""
        return self._append_branch(token_ids, params, self.next_start_time(len(token_ids)))

    def start_reduce(self) -> BranchState:
        """Start the reduce branch at the latest end of all other branches."""
        assert self.reduce is not None, "the sample has a reduce branch that has not started"
        spec, self.reduce = self.reduce, None
        branch = self._append_branch(
            spec.token_ids, spec.params, max(branch.end_time for branch in self.branches)
        )
        self.reduce_started = True
        if self.block_table is not None:
            blocks, self.reduce_blocks = self.reduce_blocks, []
            self.add_blocks(branch, blocks)
        return branch

    def next_start_time(self, num_tokens: int) -> int:
        """Time coordinate at which a branch with this many prompt tokens starts, if it is added now."""
        if not self.free_order:
            return max(len(self.main), self.next_column)
        if self.config.align_to == "left":
            return len(self.main)
        longest = max(branch.num_prompt for branch in self.branches)
        return len(self.main) + max(longest - num_tokens, 0)

    def pos2d(self, branch: BranchState, index: int = 0) -> tuple[int, int]:
        """Branch and time coordinates of a branch's token, counted from the first token of its prompt."""
        return int(self.branch_coordinates[branch.index + 1]), branch.start_time + index

    def final_layout(self) -> Layout:
        """Layout of main and of all branches as they are now, each at its start time."""
        segments = [self.main.tolist(), *(branch.token_ids for branch in self.branches)]
        tree = self.tree
        starts = np.array([branch.start_time for branch in self.branches])[: tree.branches]
        aligned_left = self.config.model_copy(update={"align_to": "left"})
        return arrange(Tokens.of_tree(segments, tree), aligned_left, delays=starts - len(self.main))

    def _append_branch(self, token_ids: Sequence[int], params: SamplingParams, start: int) -> BranchState:
        seed = self._seed if params.seed is None else params.seed
        output = self._make_output(token_ids, params)
        branch = BranchState(len(self.branches), list(token_ids), start, params, seed, output)
        self.branches.append(branch)
        return branch

    # Cache blocks

    @property
    def keeps_finished(self) -> bool:
        """Whether a reduce branch reads, or will read, the branches that have finished."""
        return self.reduce is not None or self.reduce_started

    @property
    def max_reduce_tokens(self) -> int:
        """Upper bound of the length of a reduce branch that has not started."""
        return len(self.reduce.token_ids) + self.reduce.params.max_new_tokens if self.reduce else 0

    @property
    def max_group_tokens(self) -> int:
        """Upper bound of the tokens in the group's own block table."""
        if self.free_order:
            return len(self.main)
        return len(self.main) + sum(branch.max_tokens for branch in self.branches) + self.max_reduce_tokens

    def max_branch_tokens(self) -> list[int]:
        """Upper bounds of the tokens in the branches' block tables, the reduce branch last (free order)."""
        if not self.free_order:
            return []
        keeps_finished = self.keeps_finished
        tokens = [branch.max_tokens if keeps_finished or branch.is_running else 0 for branch in self.branches]
        return [*tokens, self.max_reduce_tokens] if self.reduce else tokens

    @property
    def max_blocks(self) -> int:
        """Upper bound of the blocks that the sample fills."""
        return sum(map(blocks_for, [self.max_group_tokens, *self.max_branch_tokens()]))

    @property
    def block_tables(self) -> list[BlockTable]:
        """All block tables of an admitted sample: the group's, then those of its branches."""
        assert self.block_table is not None, "only admitted samples have blocks"
        tables = (branch.block_table for branch in self.branches)
        return [self.block_table, *(table for table in tables if table is not None)]

    def set_blocks(self, cached: list[int], allocated: list[int]) -> None:
        """Give the sample its blocks at admission.

        cached: blocks that hold the beginning of main. allocated: blocks for everything else, up to
        `max_blocks` in all.
        """
        counts = [blocks_for(self.max_group_tokens), *map(blocks_for, self.max_branch_tokens())]
        counts[0] -= len(cached)
        parts = [allocated[start:end] for start, end in pairwise(np.cumsum([0, *counts]).tolist())]
        self.block_table = BlockTable(cached + parts.pop(0))
        num_cached_tokens = len(cached) * BLOCK
        self.block_table.append(np.arange(num_cached_tokens), np.full(num_cached_tokens, MAIN))
        self.num_main_computed = self.next_column = num_cached_tokens
        self.num_cached_blocks = len(cached)
        if self.reduce is not None and self.free_order:
            self.reduce_blocks = parts.pop()
        for branch, blocks in zip(self.branches, parts, strict=False):
            branch.block_table = BlockTable(blocks)

    def add_blocks(self, branch: BranchState, blocks: list[int]) -> None:
        """Add the blocks of a branch that joins after admission."""
        if self.free_order:
            branch.block_table = BlockTable(blocks)
        else:
            assert self.block_table is not None, "only admitted samples have blocks"
            self.block_table.extend(blocks)

    def assign_slots(self, tokens: ScheduledTokens) -> Ints:
        """Append scheduled tokens to their block tables; returns their `[tokens]` slots in the cache."""
        assert self.block_table is not None, "only admitted samples are scheduled"
        if not self.free_order:
            return self.block_table.append(tokens.time, tokens.segment)
        slots = []
        for segment, index in segment_runs(tokens.segment):
            table = self.block_table if segment == MAIN else self.branches[segment - 1].block_table
            assert table is not None, "branches have block tables of their own in free order"
            slots.append(table.append(tokens.time[index], tokens.segment[index]))
        return np.concatenate(slots)


def segment_runs(segment: Ints) -> list[tuple[int, slice]]:
    """Runs of equal values: the tokens of each segment, which stand side by side in free order."""
    cuts = np.flatnonzero(np.diff(segment)) + 1
    bounds = [0, *cuts.tolist(), len(segment)]
    return [(int(segment[first]), slice(first, last)) for first, last in pairwise(bounds) if last > first]
