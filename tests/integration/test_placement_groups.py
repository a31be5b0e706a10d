"""What a lost actor has reserved of a cluster is released."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import clusters
import pytest

PYTHON = Path(sys.executable)
# In a process of its own: Ray reads some of its settings once, and other tests of this process change them.
KILL_ONE_OF_TWO = """
from contextlib import suppress
import ray
from ray.util import placement_group, placement_group_table
from workloads.common.placement_groups import remove_placement_groups_of_lost_actors

@ray.remote(num_cpus=0)
class Reserving:
    def reserve(self):
        group = placement_group([{"CPU": 1}])
        assert group.wait(60)
        return group

    def is_alive(self):
        return True

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
living, lost = Reserving.remote(), Reserving.remote()
ray.get(lost.reserve.remote())
ray.kill(lost)
with suppress(ray.exceptions.RayActorError):
    while ray.get(lost.is_alive.remote()):
        pass
remove_placement_groups_of_lost_actors()
held = ray.get(living.reserve.remote())
remove_placement_groups_of_lost_actors()
print(placement_group_table(held)["state"])
"""


@pytest.mark.slow
def test_the_cpu_that_a_killed_actor_has_reserved_is_free_again(tmp_path: Path) -> None:
    completed = subprocess.run(
        [PYTHON, "-c", KILL_ONE_OF_TWO],
        cwd=tmp_path,
        env=clusters.environment(PYTHON),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert completed.stdout.strip() == "CREATED", completed.stderr[-3000:]
