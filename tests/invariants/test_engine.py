"""Every token of an engine is sampled from the logits of one full forward pass over its own sample.

Samples are submitted, extended, cancelled and finished at random in between.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
from families import variant
from grouping import has_started_reduce
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
from recording import CONFIGS, MODELS, RecordingEngine, full_forward_logits, prompt
from transformers import PreTrainedModel

from parallelmind.config import RopeConfig
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.request import Sample
from parallelmind.engine.scheduler import EngineConfig
from parallelmind.engine.sequence_group import SequenceGroup
from parallelmind.engine.step_plan import ForwardPlan, Plan
from parallelmind.errors import UserError
from parallelmind.evaluation.probes import check_close, patched
from parallelmind.layout import PADDING

LONG = [3 + 7 * index % 120 for index in range(53)]
MAINS = [
    [],
    LONG[:9],
    LONG[:40],
    LONG[:32],
    LONG[:33] + LONG[:13],
]  # the last three begin with the same two blocks
EFFORT = settings(
    max_examples=10,
    stateful_step_count=24,
    database=None,
    phases=[Phase.generate],  # a failing example is readable as it is, and takes minutes to shrink
    suppress_health_check=list(HealthCheck),
)
MAX_BRANCHES = 7
LENGTH, NEW_TOKENS, STEPS = st.integers(1, 18), st.integers(0, 12), st.integers(0, 3)
MAIN, SHAPE = (
    st.sampled_from(MAINS),
    st.lists(st.tuples(LENGTH, NEW_TOKENS), min_size=1, max_size=4),
)  # prompt and new tokens; a branch without new ones is only read


class EngineMachine(RuleBasedStateMachine):
    """Samples are submitted, joined and cancelled at random, in a cache that holds two or three of them."""

    def __init__(self, models: list[PreTrainedModel], events: Counter[str]) -> None:
        super().__init__()
        self.models, self.events = models, events
        self.groups: dict[int, SequenceGroup] = {}  # unfinished samples by id

    @initialize(
        model=st.integers(0, len(MODELS) - 1), main=MAIN, shape=SHAPE, last=st.none() | LENGTH, then=STEPS
    )
    def begin(self, model: int, **sample: Any) -> None:
        self.model = self.models[model]
        self.engine = RecordingEngine(
            self.model,
            EngineConfig(cache_tokens=14 * BLOCK, max_prefill_tokens=7, max_branches=MAX_BRANCHES),
        )
        self.submit(**sample)

    @rule(main=MAIN, shape=SHAPE, last=st.none() | LENGTH, then=STEPS)
    def submit(self, main: list[int], shape: list[tuple[int, int]], last: int | None, then: int) -> None:
        expected_id = self.engine.samples.num_submitted
        prompts = [prompt(length, expected_id, branch) for branch, (length, _) in enumerate(shape)]
        per_branch = [{"max_new_tokens": count} for _, count in shape]
        decodes = any(count for _, count in shape)
        reduce = prompt(last or 1, expected_id, PADDING) if last or not decodes else None
        self.events["only read"] += not decodes
        sample_id = self.engine.submit(
            Sample(main, prompts), per_branch=per_branch, reduce=reduce, max_new_tokens=4, seed=expected_id
        )
        assert sample_id == expected_id
        self.groups[sample_id] = self.engine.samples.groups[sample_id]
        self.step(then)

    @precondition(lambda self: self.open_samples())
    @rule(data=st.data(), length=LENGTH, max_new_tokens=NEW_TOKENS, then=STEPS)
    def join(self, data: st.DataObject, length: int, max_new_tokens: int, then: int) -> None:
        sample_id = data.draw(st.sampled_from(self.open_samples()))
        group = self.groups[sample_id]
        with suppress(UserError):  # it would not fit an empty cache
            self.engine.join(
                sample_id,
                prompt(length, sample_id, len(group.branches)),
                max_new_tokens=max_new_tokens,
                seed=sample_id,
            )
            self.events["joined late"] += any(branch.num_computed for branch in group.branches)
        self.step(then)

    @precondition(lambda self: self.groups)
    @rule(data=st.data(), then=STEPS)
    def cancel_a_branch(self, data: st.DataObject, then: int) -> None:
        sample_id = data.draw(st.sampled_from(sorted(self.groups)))
        self.engine.cancel(
            sample_id,
            data.draw(st.sampled_from([branch.index for branch in self.groups[sample_id].running_branches])),
        )
        self.step(then)

    @precondition(lambda self: len(self.groups) > 1)
    @rule(data=st.data(), then=STEPS)
    def cancel_a_sample(self, data: st.DataObject, then: int) -> None:
        self.engine.cancel(data.draw(st.sampled_from(sorted(self.groups))))
        self.step(then)

    @precondition(lambda self: self.engine.scheduler.running)
    @rule(data=st.data(), then=STEPS)
    def preempt(self, data: st.DataObject, then: int) -> None:
        """Preempt any sample, as a full cache does with the newest."""
        group = data.draw(st.sampled_from(self.engine.scheduler.running))
        self.engine.scheduler.begin(Plan((group,), (), (), ForwardPlan(None, ()), ()))
        self.step(then)

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()
            waiting, running = self.engine.scheduler.waiting, self.engine.scheduler.running
            self.events["waited for room"] += bool(waiting and running)
            self.events["stopped within a prompt"] += any(group.num_waiting_prefill for group in running)
            self.events["read by all"] += any(map(has_started_reduce, running))
            self.finished_samples_agree_with_one_forward_pass()
            self.every_block_is_held_by_its_tables()

    def open_samples(self) -> list[int]:
        """Samples that can be joined: the reduce branch has not started, and one more branch is allowed."""
        return [
            sample_id
            for sample_id, group in self.groups.items()
            if len(group.branches) < MAX_BRANCHES - 1 and not has_started_reduce(group)
        ]

    @invariant()
    def finished_samples_agree_with_one_forward_pass(self) -> None:
        for sample_id in [sample_id for sample_id, group in self.groups.items() if not group.is_running]:
            group = self.groups.pop(sample_id)
            expected = full_forward_logits(self.model, group)[1:]
            for branch in group.branches:
                logits = self.engine.logits[sample_id, branch.index]
                assert len(logits) == len(branch.generated)
                if logits:
                    first = branch.num_prompt - 1
                    check_close(
                        torch.stack(logits),
                        expected[branch.index][first : first + len(logits)],
                        f"sample {sample_id}, branch {branch.index}: cached and full logits",
                    )

    @invariant()
    def every_block_is_held_by_its_tables(self) -> None:
        """Blocks that are being written have one holder, cached blocks may have several."""
        manager, running = self.engine.scheduler.block_manager, self.engine.scheduler.running
        tables = [segment.table for group in running for segment in group.segments]
        held = Counter(block for table in tables for block in table.blocks)
        assert held == Counter(dict(enumerate(manager._holders)))
        branches = [branch for group in running for branch in group.running_branches]
        assert all(held[table.blocks[-1]] == 1 for branch in branches if (table := branch.table).num_free)

    def teardown(self) -> None:
        while self.engine.busy:
            self.step(1)
        scheduler = self.engine.scheduler
        assert not self.groups
        assert not scheduler.running
        assert not scheduler.waiting
        assert scheduler.block_manager.num_available == scheduler.block_manager.num_blocks
        self.events["reused blocks"] += bool(scheduler.num_reused_tokens)
        self.events["preempted"] += bool(scheduler.num_preemptions)


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda part: f"{part.visibility}-{part.positions}-{part.align_to}"
)
def test_every_sample_equals_one_full_forward_pass(config: RopeConfig) -> None:
    events: Counter[str] = Counter()
    models = [variant(name, attention) for name, attention in MODELS]

    @seed(CONFIGS.index(config))
    def machine() -> EngineMachine:
        return EngineMachine(models, events)

    with ExitStack() as stack:
        for model in models:
            stack.enter_context(patched(model, config))
        run_state_machine_as_test(machine, settings=EFFORT)
    kinds = {"joined late", "waited for room", "stopped within a prompt", "read by all", "reused blocks"}
    kinds |= {"only read", "preempted"}
    assert set(+events) == kinds


@pytest.mark.parametrize(("max_prefill_tokens", "new_tokens"), [(512, 4), (24, 4), (24, 30)])
def test_frequencies_that_depend_on_the_length_are_those_of_the_whole_sample(
    max_prefill_tokens: int, new_tokens: int
) -> None:
    """longrope has other frequencies above 64 positions: neither chunks nor the cache may mix them."""
    model = variant("longrope")
    with patched(model, RopeConfig(visibility="isolated", positions="time", rope_2d_ratio=0)):
        limits = EngineConfig(cache_tokens=2048, max_prefill_tokens=max_prefill_tokens)
        engine, main, groups = RecordingEngine(model, limits), prompt(48, 1), list[Any]()
        for seed, length in enumerate((4, 60 - new_tokens, 4, 9)):
            engine.submit(
                Sample(main, [prompt(length, 2)]), seed=seed, max_new_tokens=new_tokens, ignore_eos=True
            )
            groups += engine.samples.groups.values()
            while engine.busy:
                engine.step()
        assert engine.scheduler.num_reused_tokens > 48
        for group in groups:
            (branch,) = group.branches
            assert len(group.main) + branch.num_tokens <= 64 or group.has_long_frequencies
            expected = full_forward_logits(model, group)[branch.number][branch.num_prompt - 1 : -1]
            check_close(torch.stack(engine.logits[group.id, 0]), expected, f"sample {group.id}")


def test_a_branch_that_would_change_the_frequencies_of_a_sample_is_refused() -> None:
    model = variant("longrope")
    with patched(model, RopeConfig(visibility="isolated", positions="time", rope_2d_ratio=0)):
        engine = RecordingEngine(model, EngineConfig(cache_tokens=2048))
        number = engine.submit(Sample(prompt(48, 1), [prompt(4, 2)]), max_new_tokens=9)
        with pytest.raises(
            UserError, match=r"max_new_tokens=4: 92 positions; above 64 .* submit all branches"
        ):
            engine.join(number, prompt(40, 3), max_new_tokens=4)
        engine.join(number, prompt(4, 3), max_new_tokens=4)
