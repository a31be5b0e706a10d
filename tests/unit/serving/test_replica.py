"""An engine as Serve runs it, but in this process: what it takes on while a sample goes on."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from engines import saved_adapters

from parallelmind.engine.request import Sample
from parallelmind.engine.sampling_params import SamplingParams
from parallelmind.engine.tokenization import tokenize_request
from serving.config import AppConfig
from serving.engine.messages import EngineRequest, RejectedRequest
from serving.engine.replica import EngineReplica

PARAMS = SamplingParams(max_new_tokens=30, ignore_eos=True)


def replica(folder: Path, **settings: Any) -> EngineReplica:
    saved_adapters(folder)
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    changes: Any = {
        name: lambda *_: None for name in ("keep_on_node_address", "set_up")
    }  # these change the process
    with (
        patch.multiple("serving.engine.replica", **changes),
        patch("serving.engine.replica.serve.get_replica_context", lambda: context),
    ):
        return EngineReplica(
            AppConfig.of(
                {"base_model": str(folder / "base"), "cache_tokens": 4096, "num_threads": 1, **settings}
            )
        )


def joined(
    to: EngineReplica, tokens: list[int], reduce: list[int] | None = None
) -> list[int | RejectedRequest | None]:
    """What becomes of branches of so many tokens that join a sample with six: main has three, its two
    branches one or two.
    """

    async def play() -> list[int | RejectedRequest | None]:
        sample = Sample([5, 6, 7], [[8], [9, 10]])
        asked = tokenize_request(
            to._engine.tokenizer, sample, None, reduce, {"max_new_tokens": 30, "ignore_eos": True}
        )
        steps = to.decode(EngineRequest("smp-1", "base", asked))
        await anext(steps)
        found = [await to.join("smp-1", [11] * count, PARAMS) for count in tokens]
        await steps.aclose()
        to._stepper.stop()
        return found

    return asyncio.run(play())


def test_branches_that_join_count_among_those_that_a_sample_may_have(tmp_path: Path) -> None:
    one, other, refused = joined(replica(tmp_path, max_branches=4), [1, 1, 1])
    assert (one, other) == (2, 3)
    assert refused == RejectedRequest("text: branch 5 of its sample, 4 allowed; begin another sample")


def test_what_they_read_counts_among_a_samples_prompt_tokens(tmp_path: Path) -> None:
    told = "text: 9 prompt tokens with the rest of its sample, 8 allowed; shorten it or begin another sample"
    assert joined(replica(tmp_path, max_prompt_tokens=8), [1, 2, 1]) == [2, RejectedRequest(told), 3]


def test_so_does_the_branch_that_reads_all_others(tmp_path: Path) -> None:
    (refused,) = joined(replica(tmp_path, max_branches=3), [1], reduce=[12])
    assert isinstance(refused, RejectedRequest)
