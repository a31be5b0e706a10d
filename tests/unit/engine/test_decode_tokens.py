"""The tokens of samples that only decode are those that each sample's own schedule would choose."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import numpy as np
from grouping import ReduceSpec, has_started_reduce, sequence_group

from parallelmind.config import RopeConfig
from parallelmind.engine import planner
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.decode_tokens import only_decodes
from parallelmind.engine.planner import Plan, ScheduledGroup
from parallelmind.engine.scheduler import EngineConfig, Scheduler

FREE = RopeConfig(visibility="isolated", rope_2d_ratio=0)


def submit(scheduler: Scheduler, number: int, rng: random.Random) -> None:
    texts = [[rng.randrange(900) for _ in range(rng.randint(1, 20))] for _ in range(rng.randint(1, 4))]
    reduce = ReduceSpec(rng.randint(1, 20), 5) if rng.random() < 0.4 else None
    group = sequence_group(range(rng.randint(0, 40)), texts, FREE, rng.randint(2, 40), reduce)
    group.id = number
    scheduler.submit(group)


def step(scheduler: Scheduler, rng: random.Random) -> Plan:
    """A step of an engine without a model; branches finish by chance or by length."""
    plan = scheduler.schedule()
    scheduler.begin(plan)
    scheduler.commit(plan.scheduled)
    for item in plan.scheduled:
        for index in item.tokens.sampled_branches.tolist():
            branch = item.group.branches[index]
            branch.append_token(rng.randrange(900))
            if len(branch.generated) == branch.params.max_new_tokens or rng.random() < 0.03:
                scheduler.finish_branch(item.group, branch, "length")
                item.group.start_ready()
    return plan


def as_values(item: ScheduledGroup) -> tuple[Any, ...]:
    arrays = ("ids", "segment", "branch", "time", "position", "counts", "logits_indices", "sampled_branches")
    tokens = [np.asarray(getattr(item.tokens, name)).tolist() for name in arrays]
    filled = [(blocks.segment, blocks.keys, blocks.path.digest()) for blocks in item.filled]
    return item.group, tokens, item.tokens.next_column, item.slots.tolist(), item.blocks, filled


def test_a_plan_does_not_depend_on_how_decoding_samples_are_planned() -> None:
    num_together = num_preempted = 0
    for rng in map(random.Random, range(8)):
        scheduler = Scheduler(EngineConfig(30 * BLOCK, max_prefill_tokens=40))
        for number in range(25):
            submit(scheduler, number, rng)
        while scheduler.running or scheduler.waiting:
            num_together += sum(map(only_decodes, scheduler.running))
            with mock.patch.object(planner, "only_decodes", return_value=False):
                expected = scheduler.schedule()
            plan = step(scheduler, rng)
            assert list(map(as_values, plan.scheduled)) == list(map(as_values, expected.scheduled))
            assert (plan.preempted, plan.admitted) == (expected.preempted, expected.admitted)
            num_preempted += len(plan.preempted)
    assert num_together > 1000
    assert num_preempted > 5


def test_a_sample_does_not_only_decode_while_a_finished_branch_is_still_read() -> None:
    group = sequence_group([1, 2], [[3], [4]], FREE, 4, ReduceSpec(1, 2))
    scheduler = Scheduler(EngineConfig(10 * BLOCK))
    scheduler.submit(group)
    assert not only_decodes(group)
    plan = scheduler.schedule()
    scheduler.begin(plan)
    scheduler.commit(plan.scheduled)
    for branch in group.branches:
        branch.append_token(9)
    assert only_decodes(group)
    scheduler.finish_branch(group, group.branches[0], "stop")
    assert only_decodes(group)
    scheduler.finish_branch(group, group.branches[1], "stop")
    group.start_ready()
    assert has_started_reduce(group)
    assert not only_decodes(group)
