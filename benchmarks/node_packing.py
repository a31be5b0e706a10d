"""How many nodes Ray's autoscaler starts for placement groups on the cluster of ray_cluster.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Bundle = Mapping[str, float]

CLUSTER = Path(__file__).resolve().parents[1] / "ray_cluster.yaml"


def cluster_config() -> dict[str, Any]:
    """ray_cluster.yaml with Ray's defaults filled in, as by `ray up`."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(yaml.safe_load(CLUSTER.read_text(encoding="utf-8")))


def nodes_started(groups: Sequence[Sequence[Bundle]]) -> dict[str, int]:
    """Number of nodes by type that the autoscaler starts for pending placement groups.

    groups: the bundles of every group. Computed by Ray's own scheduler, without a cluster. Raises ValueError
    for a group that the cluster cannot hold.
    """
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest  # type: ignore[attr-defined]

    config = cluster_config()
    requests = [
        GangResourceRequest(requests=[ResourceRequestUtil.make(dict(bundle)) for bundle in bundles])
        for bundles in groups
    ]
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=_node_types(config),
            max_num_nodes=config["max_workers"],
            gang_resource_requests=requests,
        )
    )
    if reply.infeasible_gang_resource_requests:
        raise ValueError(f"no room for {reply.infeasible_gang_resource_requests}")
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def _node_types(config: Mapping[str, Any]) -> dict[str, Any]:
    """The types of worker nodes as the autoscaler has them."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig

    types = config["available_node_types"].items()
    return {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=node_type["min_workers"],
            max_worker_nodes=node_type["max_workers"],
            resources=node_type["resources"],
        )
        for name, node_type in types
        if name != config["head_node_type"]
    }
