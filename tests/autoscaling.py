"""The cluster of ray_cluster.yaml on this machine: Ray's autoscaler starts processes instead of machines.

The head, the autoscaler and the raylets are real. Machines, and so ssh, containers, setup commands and spot
prices, are not. A node declares the resources of its type, whatever this machine has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import clusters
import yaml
from servers import ROOT, Server

from serving.runtime.ports import free_port

CLUSTER = ROOT / "ray_cluster.yaml"
_HEAD_ID = "f" * 51 + "00000"  # the id that Ray's fake node provider expects of the head
_HEAD_TYPE = "ray.head.default"
GROWS_TO = "PARALLELMIND_GROWS_TO"


def prepared_config() -> dict[str, Any]:
    """ray_cluster.yaml with Ray's defaults filled in, as by `ray up`."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(yaml.safe_load(CLUSTER.read_text(encoding="utf-8")))


def grows_to(config: dict[str, Any]) -> str:
    """The value of $PARALLELMIND_GROWS_TO on the nodes: how large the cluster may become."""
    (run_option,) = [option for option in config["docker"]["run_options"] if GROWS_TO in option]
    return str(run_option.partition(f"{GROWS_TO}=")[2])


def local_config(gcs_port: int, idle_s: float) -> dict[str, Any]:
    """The configuration with processes of this machine as nodes."""
    config = prepared_config()
    types = config["available_node_types"]
    no_commands = {name: [] for name in config if name.endswith("_commands")}
    return {
        **{
            name: config[name]
            for name in ("cluster_name", "max_workers", "upscaling_speed", "cluster_synced_files")
        },
        **no_commands,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{gcs_port}",
            "use_node_id_as_ip": True,  # all nodes have the same address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "file_mounts": {},
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE if name == config["head_node_type"] else name: _local_node_type(node_type)
            for name, node_type in types.items()
        },
    }


def _local_node_type(node_type: dict[str, Any]) -> dict[str, Any]:
    limits = {name: node_type[name] for name in ("min_workers", "max_workers")}
    return {
        **limits,
        "node_config": {},
        "resources": {**node_type["resources"], "object_store_memory": 2**27},
    }


@contextmanager
def autoscaling_cluster(python: Path, folder: Path, idle_s: float) -> Iterator[Server]:
    """A running head with its autoscaler; yields the dashboard. A worker ends after `idle_s` without work."""
    gcs_port = free_port()
    config = local_config(gcs_port, idle_s)
    path = folder / "cluster.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    settings = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        GROWS_TO: grows_to(prepared_config()),
    }
    cpus = config["available_node_types"][_HEAD_TYPE]["resources"]["CPU"]
    options = [f"--autoscaling-config={path}"]
    with clusters.cluster(python, cpus, gcs_port=gcs_port, options=options, **settings) as dashboard:
        yield dashboard


def count_workers(dashboard: Server) -> int:
    """The number of live nodes without the head, which must be alive."""
    nodes = dashboard.get("/api/v0/nodes?detail=True&limit=1000")[1]["data"]["result"]["result"]
    is_head = [node["is_head_node"] for node in nodes if node["state"] == "ALIVE"]
    assert is_head.count(True) == 1, "the head is not alive"
    return is_head.count(False)
