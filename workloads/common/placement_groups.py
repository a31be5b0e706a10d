"""Release what an ended actor has reserved of a Ray cluster."""

from __future__ import annotations

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.util.placement_group import PlacementGroup, remove_placement_group


def remove_placement_groups_of_lost_actors() -> None:
    """Remove the placement groups of this job whose creator has ended.

    Ray keeps them until the job ends. Ray Train has an actor that removes those of its controller, but when
    memory runs out, that actor may be ended together with the controller.

    Relies on: the table of placement groups in Ray's global state, which names their creators.
    """
    job = ray.get_runtime_context().get_job_id()
    for row in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        is_removed = group.state == PlacementGroupTableData.REMOVED
        if group.creator_actor_dead and group.creator_job_id.hex() == job and not is_removed:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
