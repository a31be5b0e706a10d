"""Trees that grow: every token is sampled from the logits of one full forward pass over the final tree.

Samples are trees when they are submitted. Their branches are forked, joined, reduced and cancelled at random
in between, at all depths.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from families import variant
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from recording import CONFIGS, MODELS, RecordingEngine, full_forward_logits
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.request import Sample, Segment
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.sequence import BranchState
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.errors import UserError
from parallelmind.evaluation.probes import check_close, patched
from parallelmind.evaluation.tiny_models import VOCABULARY
from parallelmind.layout import Tokens, arrange

EFFORT = settings(
    max_examples=24,
    stateful_step_count=24,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
MAX_SEGMENTS = 14
KINDS = {"nested", "a reduce of a branch", "forked", "forked a branch of a branch", "forked within a prompt"}
KINDS |= {"joined main", "joined a branch", "reduced main", "reduced a branch", "cancelled before the start"}
STEPS, SHAPE = st.integers(0, 3), st.integers(0, 2**32)  # a number from which a tree is made
MAIN = st.sampled_from([[], [5, 6, 7], list(range(60, 80))])


class Growth:
    """Makes random trees of segments with 1 to 6 prompt tokens and 0 to 7 new ones."""

    def __init__(self, shape: int) -> None:
        self.rng = random.Random(shape)

    def segments(self, at_most: int, depth: int = 0) -> list[Segment]:
        return [self.segment(depth) for _ in range(self.rng.randint(1, at_most))]

    def segment(self, depth: int = 0, is_reduce: bool = False) -> Segment:
        forks = self.rng.random() < (0.5, 0.3, 0.1)[min(depth, 2)]
        branches = self.segments(2, depth + 1) if forks else []
        reduce = self.segment(depth + 1, is_reduce=True) if branches and self.rng.random() < 0.5 else None
        text = [self.rng.randrange(3, VOCABULARY) for _ in range(self.rng.randint(1, 6))]
        new = self.rng.randint(is_reduce and not branches, 7)
        return Segment(text, branches, reduce, {"max_new_tokens": new})


def depth_of(group: SequenceGroup, number: int) -> int:
    return len(group.shape.paths[number])


class TreeMachine(RuleBasedStateMachine):
    """Trees grow at random, in a cache that holds two or three of them."""

    def __init__(self, models: list[PreTrainedModel], events: Counter[str]) -> None:
        super().__init__()
        self.models, self.events = models, events
        self.groups: dict[int, SequenceGroup] = {}
        self.grown: set[int] = set()  # samples whose tree differs from the submitted one
        self.ends: Counter[tuple[int, int]] = Counter()

    @initialize(model=st.integers(0, len(MODELS) - 1), main=MAIN, shape=SHAPE)
    def begin(self, model: int, **sample: Any) -> None:
        self.model = self.models[model]
        self.engine = RecordingEngine(
            self.model,
            EngineConfig(cache_tokens=28 * BLOCK, max_prefill_tokens=7, max_branches=MAX_SEGMENTS),
        )
        self.submit(**sample, then=1)

    @rule(main=MAIN, shape=SHAPE, then=STEPS)
    def submit(self, main: list[int], shape: int, then: int) -> None:
        number, growth = self.engine.samples.num_submitted, Growth(shape)
        reduce = growth.segment(is_reduce=True) if shape % 3 == 0 else None
        sample = Sample(main, growth.segments(3), reduce)
        if self.attempt(lambda: self.engine.submit(sample, seed=number)):
            self.groups[number] = self.engine.samples.groups[number]
            self.events["nested"] += self.groups[number].tree.depth > 1
        self.step(then)

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), shape=SHAPE, then=STEPS)
    def fork(self, data: st.DataObject, shape: int, then: int) -> None:
        group = self.draw_group(data)
        running = [branch.index for branch in group.running_branches]
        if running:
            branch, prompts = data.draw(st.sampled_from(running)), Growth(shape).segments(2)
            if self.attempt(lambda: self.engine.fork(group.id, branch, prompts, seed=group.id)):
                self.grown.add(group.id)
                self.events["forked"] += 1
                self.events["forked a branch of a branch"] += depth_of(group, branch + 1) > 2
                self.events["forked within a prompt"] += not group.branches[branch].generated
        self.step(then)

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), shape=SHAPE, then=STEPS)
    def join(self, data: st.DataObject, shape: int, then: int) -> None:
        group, segment = self.draw_group(data), Growth(shape).segment()
        parent = data.draw(st.none() | st.sampled_from([branch.index for branch in group.branches]))
        if self.attempt(lambda: self.engine.join(group.id, segment, parent, seed=group.id)):
            self.grown.add(group.id)
            self.events["joined main" if parent is None else "joined a branch"] += 1
        self.step(then)

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), shape=SHAPE, then=STEPS)
    def reduce(self, data: st.DataObject, shape: int, then: int) -> None:
        group = self.draw_group(data)
        forked = sorted({branch.parent for branch in group.branches})
        free = [number for number in forked if group.reduce_of(number) is None]
        parent = data.draw(st.sampled_from(free or forked))
        segment = Growth(shape).segment(is_reduce=True)
        index = parent - 1 if parent else None
        if self.attempt(lambda: self.engine.reduce(group.id, index, segment, seed=group.id)):
            self.grown.add(group.id)
            self.events["reduced main" if index is None else "reduced a branch"] += 1
        self.step(then)

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), then=STEPS)
    def cancel_a_subtree(self, data: st.DataObject, then: int) -> None:
        group = self.draw_group(data)
        branch = data.draw(st.sampled_from(group.branches))
        below = [each for each in (branch, *group.below(branch.number)) if not each.is_finished]
        self.grown.add(group.id)
        self.engine.cancel(group.id, branch.index)
        self.events["cancelled before the start"] += any(not each.has_started for each in below)
        assert all(each.finish_reason == "cancelled" for each in below)
        self.step(then)

    @precondition(lambda self: len(self.groups) > 1)
    @rule(data=st.data(), then=STEPS)
    def cancel_a_sample(self, data: st.DataObject, then: int) -> None:
        self.engine.cancel(self.draw_group(data).id)
        self.step(then)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            for event in self.engine.step():
                assert not self.ends[event.sample, event.branch], "no event follows the last one"
                self.ends[event.sample, event.branch] += event.finish_reason is not None
            self.finished_samples_agree_with_one_forward_pass()

    def draw_group(self, data: st.DataObject) -> SequenceGroup:
        return self.groups[data.draw(st.sampled_from(sorted(self.groups)))]

    def attempt(self, action: Any) -> bool:
        """Whether the action is not refused. A refused one changes nothing."""
        before = {number: snapshot(group) for number, group in self.groups.items()}
        try:
            action()
        except UserError:
            assert before == {number: snapshot(group) for number, group in self.groups.items()}
            return False
        return True

    @invariant()
    def finished_samples_agree_with_one_forward_pass(self) -> None:
        for sample_id in [sample_id for sample_id, group in self.groups.items() if not group.is_running]:
            group = self.groups.pop(sample_id)
            check_places(group, sample_id in self.grown)
            expected = full_forward_logits(self.model, group)
            for branch in group.branches:
                self.events["a reduce of a branch"] += branch.is_reduce and depth_of(group, branch.number) > 2
                logits = self.engine.logits[sample_id, branch.index]
                assert len(logits) == len(branch.generated)
                if logits:
                    first = branch.num_prompt - 1
                    check_close(
                        torch.stack(logits),
                        expected[branch.number][first : first + len(logits)],
                        f"sample {sample_id}, branch {branch.index}: cached and full logits",
                    )

    def teardown(self) -> None:
        while self.engine.busy:
            self.step(1)
        assert not self.groups
        scheduler = self.engine.scheduler
        assert not scheduler.running
        assert not scheduler.waiting
        assert scheduler.block_manager.num_available == scheduler.block_manager.num_blocks


def snapshot(group: SequenceGroup) -> list[tuple[Any, ...]]:
    return [(branch.finish_reason, branch.num_tokens, branch.start_time) for branch in group.branches]


def check_places(group: SequenceGroup, has_grown: bool) -> None:
    """Times and coordinates against the rules, segment by segment, and against training."""
    main, config = len(group.main), group.config
    started = [branch for branch in group.branches if branch.has_started]
    ends = {0: main, **{branch.number: branch.end_time for branch in started}}
    for branch in started:
        natural = reference_start(branch, group, ends)
        assert branch.start_time >= natural
        assert branch.start_time == natural or has_grown or config.align_to == "right"
        number = branch.number
        while group.segments[number].is_reduce:
            number = group.segments[number].parent
        coordinate = max(number - (not main), 0) * config.branch_stride
        assert group.pos2d(branch) == (coordinate, branch.start_time)
    if not has_grown and config.align_to == "left" and len(started) == len(group.branches):
        tokens = Tokens.of_tree([segment.token_ids for segment in group.segments], group.tree.complete())
        trained, decoded = arrange(tokens, config), group.final_layout()
        for field in ("ids", "segment", "branch", "time", "position"):
            assert np.array_equal(getattr(trained, field), getattr(decoded, field)), field


def reference_start(branch: BranchState, group: SequenceGroup, ends: dict[int, int]) -> int:
    """The latest end of what the branch waits for."""
    if not branch.is_reduce:
        return ends[branch.parent]
    below, own = {branch.parent}, {branch.number}
    for other in group.branches:
        if other.parent in own:
            own.add(other.number)
        elif other.parent in below and other.number not in own:
            below.add(other.number)
    return max(ends.get(number, 0) for number in below)


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda part: f"{part.visibility}-{part.positions}-{part.align_to}"
)
def test_every_tree_equals_one_full_forward_pass(config: RopeConfig) -> None:
    events: Counter[str] = Counter()
    models = [variant(name, attention) for name, attention in MODELS]

    @seed(CONFIGS.index(config))
    def machine() -> TreeMachine:
        return TreeMachine(models, events)

    with ExitStack() as stack:
        for model in models:
            stack.enter_context(patched(model, config))
        run_state_machine_as_test(machine, settings=EFFORT)
    assert set(+events) >= KINDS
