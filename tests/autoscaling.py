"""The node types of ray_cluster.yaml on this machine: Ray's own autoscaler, with processes in place of rented
machines.

Real: the head, the autoscaler, its decisions, and raylets that come and go. Not real: the machines, and so
ssh, containers, setup commands and spot prices. Every node has the resources of its type on paper, whatever
this machine has.
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
_HEAD_ID = "f" * 51 + "00000"  # what Ray's provider of processes takes the head to be
_HEAD_TYPE = "ray.head.default"
GROWS_TO = "PARALLELMIND_GROWS_TO"


def prepared() -> dict[str, Any]:
    """ray_cluster.yaml with Ray's defaults filled in, as `ray up` does before it rents anything."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(yaml.safe_load(CLUSTER.read_text(encoding="utf-8")))


def grows_to(config: dict[str, Any]) -> str:
    """What nodes are told of how large the cluster may become."""
    (found,) = [option for option in config["docker"]["run_options"] if GROWS_TO in option]
    return str(found.partition(f"{GROWS_TO}=")[2])


def local_form(gcs_port: int, idle_s: float) -> dict[str, Any]:
    config = prepared()
    types = config["available_node_types"]
    nothing = {name: [] for name in config if name.endswith("_commands")}
    return {
        **{
            name: config[name]
            for name in ("cluster_name", "max_workers", "upscaling_speed", "cluster_synced_files")
        },
        **nothing,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": f"127.0.0.1:{gcs_port}",
            "use_node_id_as_ip": True,  # all have the same address
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "file_mounts": {},
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE if name == config["head_node_type"] else name: _local_type(found)
            for name, found in types.items()
        },
    }


def _local_type(found: dict[str, Any]) -> dict[str, Any]:
    kept = {name: found[name] for name in ("min_workers", "max_workers")}
    return {**kept, "node_config": {}, "resources": {**found["resources"], "object_store_memory": 2**27}}


@contextmanager
def autoscaled(python: Path, folder: Path, idle_s: float) -> Iterator[Server]:
    """A head with the CPUs that ray_cluster.yaml gives it, and its autoscaler; a worker goes after `idle_s`
    without work.
    """
    gcs_port = free_port()
    config = local_form(gcs_port, idle_s)
    path = folder / "cluster.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    settings = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        GROWS_TO: grows_to(prepared()),
    }
    cpus = config["available_node_types"][_HEAD_TYPE]["resources"]["CPU"]
    options = [f"--autoscaling-config={path}"]
    with clusters.cluster(python, cpus, gcs_port=gcs_port, options=options, **settings) as dashboard:
        yield dashboard


def workers(dashboard: Server) -> int:
    """How many nodes there are beside the head, which must be there."""
    found = dashboard.get("/api/v0/nodes?detail=True&limit=1000")[1]["data"]["result"]["result"]
    alive = [each["is_head_node"] for each in found if each["state"] == "ALIVE"]
    assert alive.count(True) == 1, "the head is not there"
    return alive.count(False)
