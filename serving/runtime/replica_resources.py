"""Decide `auto` in `num_cpus` and `num_gpus` of an application by the nodes of its cluster."""

from __future__ import annotations

import math
import sys

import ray

from parallelmind import cluster_nodes, hardware
from parallelmind.cluster_nodes import Node
from serving.config import AppT

_INGRESS_CPUS = 0.1  # of all ingress processes together
_RESERVED_FOR_INGRESS = 2 * _INGRESS_CPUS  # an update starts the new ones before it stops the old ones


def decide_resources(config: AppT) -> AppT:
    """The settings without `auto`. Prints a line to stderr if GPUs stay unused."""
    nodes, replicas = _nodes(), config.replicas
    gpus = cluster_nodes.total(nodes, "GPU")
    num_gpus = _gpu_share(gpus, replicas.max_replicas) if replicas.num_gpus == "auto" else replicas.num_gpus
    if gpus and not num_gpus:
        print(f"note: {gpus:g} GPU(s) stay unused: num_gpus=0", file=sys.stderr, flush=True)
    num_cpus = replicas.num_cpus
    if num_cpus == "auto":
        num_cpus = _cpus(nodes, replicas.max_replicas, num_gpus)
    return config.replace(num_cpus=num_cpus, num_gpus=num_gpus)


def ingress_cpus(num_fronts: int) -> float:
    """CPUs that each of the ingress processes reserves."""
    return math.floor(1000 * _INGRESS_CPUS / num_fronts) / 1000


def _nodes() -> list[Node]:
    """The nodes of the cluster that this process has joined, or this machine."""
    if not ray.is_initialized():
        return [{"CPU": hardware.available_cpus(), "GPU": hardware.num_gpus()}]
    return cluster_nodes.all_nodes(node["Resources"] for node in ray.nodes() if node["Alive"])


def _gpu_share(gpus: float, replicas: int) -> float:
    """One GPU for each replica, or the part of one that lets all of them run."""
    return 1 / math.ceil(replicas / gpus) if gpus else 0.0


def _cpus(nodes: list[Node], replicas: int, num_gpus: float) -> float:
    """An equal share of a node, less what all ingress processes need beside it."""
    if num_gpus:
        share = cluster_nodes.cpu_share_per_gpu(nodes, math.ceil(replicas * num_gpus)) * num_gpus
    else:
        share = cluster_nodes.cpu_share(nodes, replicas)
    return round(share - min(_RESERVED_FOR_INGRESS, _RESERVED_FOR_INGRESS * share), 3)
