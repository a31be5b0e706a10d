"""The tokens of samples that only decode are those that each sample's own schedule would choose."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import numpy as np
from grouping import ReduceSpec, has_started_reduce, sequence_group

from parallelmind.config import RopeConfig
from parallelmind.engine.block_manager import BLOCK
from parallelmind.engine.decode_batch import only_decodes
from parallelmind.engine.scheduler import EngineConfig, Scheduler
from parallelmind.engine.step_plan import Plan

FREE = RopeConfig(visibility="isolated", rope_2d_ratio=0)


def submit(scheduler: Scheduler, number: int, rng: random.Random) -> None:
    texts = [[rng.randrange(900) for _ in range(rng.randint(1, 20))] for _ in range(rng.randint(1, 4))]
    reduce = ReduceSpec(rng.randint(1, 20), 5) if rng.random() < 0.4 else None
    group = sequence_group(range(rng.randint(0, 40)), texts, FREE, rng.randint(2, 40), reduce)
    group.id = number
    scheduler.submit(group)


def run(scheduler: Scheduler, plan: Plan, rng: random.Random) -> None:
    """A step of an engine without a model; branches finish by chance or by length."""
    scheduler.begin(plan)
    scheduler.commit(plan.forward, scheduler.filled(plan.forward))
    for item in plan.forward.each():
        for index in item.tokens.sampled_branches.tolist():
            branch = item.group.branches[index]
            branch.append_token(rng.randrange(900))
            if len(branch.generated) == branch.params.max_new_tokens or rng.random() < 0.03:
                scheduler.finish_branch(item.group, branch, "length")
                item.group.start_ready()


def as_values(plan: Plan) -> list[tuple[Any, ...]]:
    """What the plan computes of each sample; which of the free blocks it takes does not matter."""
    arrays = ("ids", "segment", "branch", "time", "position", "counts", "logits_indices", "sampled_branches")
    return [
        (
            item.group.id,
            [np.asarray(getattr(item.tokens, name)).tolist() for name in arrays],
            item.tokens.next_column,
            (item.slots % BLOCK).tolist(),
            {number: len(blocks) for number, blocks in item.blocks.items()},
        )
        for item in sorted(plan.forward.each(), key=lambda item: item.group.id)
    ]


def filled(plan: Plan) -> list[tuple[Any, ...]]:
    blocks = [
        (each.group.id, each.segment.number, each.keys, each.path.digest()) for each in plan.forward.filled()
    ]
    return sorted(values for values in blocks if values[2])


def test_a_plan_does_not_depend_on_how_decoding_samples_are_planned() -> None:
    num_together = num_preempted = 0
    for rng in map(random.Random, range(8)):
        scheduler = Scheduler(EngineConfig(60 * BLOCK, max_prefill_tokens=40))
        for number in range(25):
            submit(scheduler, number, rng)
        while scheduler.running or scheduler.waiting:
            with mock.patch.object(scheduler._decoding, "divide", lambda groups: (None, groups)):
                expected = scheduler.schedule()
            plan = scheduler.schedule()
            num_together += len(plan.forward.decoding.batch.samples) if plan.forward.decoding else 0
            assert as_values(plan) == as_values(expected)
            assert filled(plan) == filled(expected)
            assert (plan.preempted, plan.admitted) == (expected.preempted, expected.admitted)
            num_preempted += len(plan.preempted)
            run(scheduler, plan, rng)
            check_tables(scheduler)
    assert num_together > 1000
    assert num_preempted > 5


def check_tables(scheduler: Scheduler) -> None:
    """The arrays say what the samples say."""
    for group in scheduler.running:
        for segment in group.segments:
            slots = segment.table.slots
            assert len(slots) == segment.num_computed == segment.table.length
            times = segment.start_time + np.arange(len(slots))
            assert scheduler.tables.time[slots].tolist() == times.tolist()
            assert dict.fromkeys((slots // BLOCK).tolist()) == dict.fromkeys(segment.table.blocks)


def test_a_sample_does_not_only_decode_while_a_finished_branch_is_still_read() -> None:
    group = sequence_group([1, 2], [[3], [4]], FREE, 4, ReduceSpec(1, 2))
    scheduler = Scheduler(EngineConfig(10 * BLOCK))
    scheduler.submit(group)
    assert not only_decodes(group)
    plan = scheduler.schedule()
    scheduler.begin(plan)
    scheduler.commit(plan.forward, [])
    for branch in group.branches:
        branch.append_token(9)
    assert only_decodes(group)
    scheduler.finish_branch(group, group.branches[0], "stop")
    assert only_decodes(group)
    scheduler.finish_branch(group, group.branches[1], "stop")
    group.start_ready()
    assert has_started_reduce(group)
    assert not only_decodes(group)
