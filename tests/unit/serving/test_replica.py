"""An engine replica in this process: branches that are added to a running sample count towards its limits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from engines import saved_adapters

from parallelmind.engine.request import Sample
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.tokenization import tokenize_request
from serving.config import AppConfig
from serving.engine.messages import EngineRequest, RejectedRequest
from serving.engine.replica import EngineReplica

PARAMS = SamplingParams(max_new_tokens=30, ignore_eos=True)


def make_replica(folder: Path, **settings: int) -> EngineReplica:
    saved_adapters(folder)
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    fields = {"base_model": str(folder / "base"), "cache_tokens": 4096, "num_threads": 1, **settings}
    # These two change the process.
    process_changes = patch.multiple(
        "serving.engine.replica",
        bind_replica_port_to_node_address=lambda: None,
        configure_log=lambda _: None,
    )
    with process_changes, patch("serving.engine.replica.serve.get_replica_context", lambda: context):
        return EngineReplica(AppConfig.of(fields))


def add_branches(
    replica: EngineReplica, lengths: list[int], reduce: list[int] | None = None
) -> list[int | RejectedRequest | None]:
    """Add branches of these lengths to a sample of two branches and six prompt tokens."""

    async def run() -> list[int | RejectedRequest | None]:
        sample, settings = Sample([5, 6, 7], [[8], [9, 10]]), {"max_new_tokens": 30, "ignore_eos": True}
        tokenized = tokenize_request(replica._engine.tokenizer, sample, None, reduce, settings)
        steps = replica.generate(EngineRequest("smp-1", "base", [tokenized]))
        await anext(steps)
        results = [
            await replica.add_branch("smp-1", [11] * length, PARAMS, f"key {number}")
            for number, length in enumerate(lengths)
        ]
        await steps.aclose()
        replica._loop.stop()
        return results

    return asyncio.run(run())


def test_added_branches_count_towards_the_branches_of_a_sample(tmp_path: Path) -> None:
    first, second, rejected = add_branches(make_replica(tmp_path, max_branches=4), [1, 1, 1])
    assert (first, second) == (2, 3)
    assert rejected == RejectedRequest("text: branch 5 of its sample, 4 allowed; begin another sample")


def test_their_prompts_count_towards_the_prompt_tokens_of_a_sample(tmp_path: Path) -> None:
    message = (
        "text: 9 prompt tokens with the rest of its sample, 8 allowed; shorten it or begin another sample"
    )
    results = add_branches(make_replica(tmp_path, max_prompt_tokens=8), [1, 2, 1])
    assert results == [2, RejectedRequest(message), 3]


def test_the_reduce_branch_counts_too(tmp_path: Path) -> None:
    (rejected,) = add_branches(make_replica(tmp_path, max_branches=3), [1], reduce=[12])
    assert isinstance(rejected, RejectedRequest)


def test_a_branch_that_is_added_again_with_the_same_key_is_the_same_branch(tmp_path: Path) -> None:
    replica = make_replica(tmp_path)

    async def run() -> None:
        tokenized = tokenize_request(
            replica._engine.tokenizer, Sample([5, 6, 7], [[8]]), None, None, {"max_new_tokens": 300}
        )
        request = EngineRequest("smp-1", "base", [tokenized], joined={"earlier": 0})
        steps = replica.generate(request)
        await anext(steps)
        keys = ["one", "one", "two", "one", "earlier"]
        indices = await asyncio.gather(*(replica.add_branch("smp-1", [11], PARAMS, key) for key in keys))
        assert indices == [1, 1, 2, 1, 0]
        assert await replica.add_branch("smp-2", [11], PARAMS, "one") is None
        await steps.aclose()
        replica._loop.stop()

    asyncio.run(run())
