"""What a lost actor has reserved of a cluster is released."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
import ray
from ray.util import placement_group

from workloads.common.placement_groups import remove_placement_groups_of_lost_actors

pytestmark = pytest.mark.slow


@pytest.fixture
def one_cpu() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote(num_cpus=0)
class Reserving:
    def reserve(self) -> Any:
        group = placement_group([{"CPU": 1}])
        assert group.wait(30)
        return group


@pytest.mark.usefixtures("one_cpu")
def test_the_cpu_that_a_killed_actor_has_reserved_is_free_again() -> None:
    living, lost = Reserving.remote(), Reserving.remote()
    ray.get(lost.reserve.remote())
    ray.kill(lost)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(lost.reserve.remote())
    remove_placement_groups_of_lost_actors()
    held = ray.get(living.reserve.remote())
    remove_placement_groups_of_lost_actors()
    assert ray.util.placement_group_table(held)["state"] == "CREATED"
