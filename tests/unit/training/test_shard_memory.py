"""Peak memory of the workers of a sharded run."""

from __future__ import annotations

import pytest

from benchmarks.shard_memory import shares

pytestmark = [pytest.mark.slow, pytest.mark.full]


@pytest.mark.parametrize("workers", [2, 4])
def test_a_worker_holds_its_part_of_the_model_and_little_more(workers: int) -> None:
    """The tenth above its part are the copies of a gathered layer, the adapter and activations."""
    loading, training = shares(workers)
    assert loading <= 1 / workers + 0.1
    assert training <= 1 / workers + 0.1
