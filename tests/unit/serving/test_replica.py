"""An engine replica in this process: what is added to a running sample has a path and keeps its limits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from threading import Thread, current_thread
from typing import Any
from uuid import uuid4

import pytest
import torch
from replicas import make_replica

from parallelmind.engine.request import Sample, Segment
from parallelmind.engine.tokenization import tokenize_request
from serving.config import AppConfig
from serving.engine import replica as replica_module
from serving.engine.messages import EngineRequest, RejectedRequest
from serving.engine.replica import EngineReplica

SAMPLING = {"max_new_tokens": 30, "ignore_eos": True}


def change(
    replica: EngineReplica,
    calls: Callable[[EngineReplica], Sequence[Awaitable[Any]]],
    reduce: list[int] | None = None,
) -> list[Any]:
    """Results of calls on a sample of two branches and six prompt tokens, while it runs."""

    async def run() -> list[Any]:
        sample = Sample([5, 6, 7], [[8], [9, 10]])
        tokenized = tokenize_request(replica._engine.tokenizer, sample, None, reduce, SAMPLING)
        steps = replica.generate(EngineRequest("smp-1", "base", [tokenized]))
        await anext(steps)
        results = [await call for call in calls(replica)]
        await steps.aclose()
        replica._loop.stop()
        return results

    return asyncio.run(run())


def join(replica: EngineReplica, length: int, branch: int | None = None) -> Awaitable[Any]:
    return replica.join("smp-1", Segment([11] * length, sampling=SAMPLING), branch, uuid4().hex)


def test_added_branches_count_towards_the_branches_of_a_sample(tmp_path: Path) -> None:
    replica = make_replica(tmp_path, max_branches=4)
    first, second, rejected = change(replica, lambda replica: [join(replica, 1) for _ in range(3)])
    assert (first, second) == ([(2, "branches[2]")], [(3, "branches[3]")])
    message = "branches: 5 branches with the rest of the sample, 4 allowed; begin another sample"
    assert rejected == RejectedRequest(message)


def test_their_prompts_count_towards_the_prompt_tokens_of_a_sample(tmp_path: Path) -> None:
    replica = make_replica(tmp_path, max_prompt_tokens=8)
    first, rejected, second = change(replica, lambda replica: [join(replica, length) for length in (1, 2, 1)])
    message = (
        "text: 9 prompt tokens with the rest of the sample, 8 allowed; shorten it or begin another sample"
    )
    assert rejected == RejectedRequest(message)
    assert [path for added in (first, second) for _, path in added] == ["branches[2]", "branches[3]"]


def test_the_reduce_branch_counts_too(tmp_path: Path) -> None:
    (rejected,) = change(make_replica(tmp_path, max_branches=3), lambda replica: [join(replica, 1)], [12])
    assert isinstance(rejected, RejectedRequest)


def test_a_call_that_is_repeated_with_the_same_key_adds_nothing_more(tmp_path: Path) -> None:
    replica, segment = make_replica(tmp_path), Segment([11], sampling=SAMPLING)

    async def run() -> None:
        tokenized = tokenize_request(
            replica._engine.tokenizer, Sample([5, 6, 7], [[8]]), None, None, SAMPLING
        )
        request = EngineRequest("smp-1", "base", [tokenized], added={"earlier": [0]})
        steps = replica.generate(request)
        await anext(steps)
        keys = ["one", "one", "two", "one", "earlier"]
        added = await asyncio.gather(*(replica.join("smp-1", segment, None, key) for key in keys))
        assert [index for ((index, _),) in added] == [1, 1, 2, 1, 0]
        assert added[0] == [(1, "branches[1]")]
        await steps.aclose()
        replica._loop.stop()

    asyncio.run(run())


def test_segments_that_are_added_are_named_by_their_paths(tmp_path: Path) -> None:
    below = Segment([11], [Segment([12], sampling=SAMPLING)], sampling=SAMPLING)
    leaf = Segment([13], sampling=SAMPLING)

    def calls(replica: EngineReplica) -> list[Awaitable[Any]]:
        return [
            replica.fork("smp-1", [below, leaf], 0, "686"),  # 2, with 3 below it, and 4
            replica.reduce("smp-1", leaf, 0, "452"),  # 5
            join(replica, 1, branch=0),  # 6
            join(replica, 1, branch=3),  # 7
            replica.reduce("smp-1", leaf, None, "635"),  # 8
            replica.fork("smp-1", [leaf], 0, "251"),
            replica.reduce("smp-1", leaf, 77, "442"),
            replica.join("smp-2", leaf, None, "359"),
        ]

    *added, forked, unknown, elsewhere = change(make_replica(tmp_path), calls)
    assert added == [
        [(2, "branches[0].branches[0]"), (4, "branches[0].branches[1]")],
        [(5, "branches[0].reduce")],
        [(6, "branches[0].branches[2]")],
        [(7, "branches[0].branches[0].branches[0].branches[0]")],
        [(8, "reduce")],
    ]
    assert forked == RejectedRequest("branch=0: has ended; fork a branch that runs")
    assert unknown == RejectedRequest("branch=77: unknown; the sample has branches 0 to 8")
    assert elsewhere is None


def test_the_thread_that_loads_the_model_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more OpenMP threads than CPUs none waits actively for the next operation; these end with it."""
    threads, load = list[tuple[Thread, int]](), replica_module.load_model

    def recorded_load(config: AppConfig) -> Any:
        threads.append((current_thread(), torch.get_num_threads()))
        return load(config)

    monkeypatch.setattr(replica_module, "load_model", recorded_load)
    make_replica(tmp_path, num_threads=3)
    ((thread, num_threads),) = threads
    assert not thread.is_alive()
    assert num_threads == 3
