"""What a cluster offers, and how runs and workers divide it."""

from __future__ import annotations

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
import ray

from parallelmind import cluster_nodes, hardware
from parallelmind.cluster_nodes import Node
from parallelmind.errors import UserError

# Of a sweep's trial, for the process that waits for its workers. Twenty of them fit beside workers that
# have all other CPUs of a node, so that the drivers of many trials take no worker's place.
TRIAL_DRIVER_CPUS = 0.001
_LEFT_FOR_DRIVERS = 0.02
_ROUNDING = 1e-6  # of Ray's amounts


def nodes() -> list[Node]:
    """Resources of every node that the cluster has, or that its autoscaler can add."""
    return cluster_nodes.all_nodes(node["Resources"] for node in ray.nodes() if node["Alive"])


def capacity(resource: str) -> float:
    """Total amount of a resource that the cluster has, or that its autoscaler can add."""
    return cluster_nodes.total(nodes(), resource)


def cpus_per_worker(workers: int, use_gpu: bool) -> float:
    """CPUs to reserve for each worker: its share of a node, so that workers spread over as many as they fill.

    Nothing else needs a CPU while workers run: data is read beside them (`data.pipeline.start_batch_server`).
    """
    share = cluster_nodes.cpu_share_per_gpu if use_gpu else cluster_nodes.cpu_share
    return share(nodes(), workers)


def cpus_per_trial_worker(cpus_per_trial: int, workers: int) -> float:
    """CPUs to reserve for each worker of a sweep's trial, which leave room for the trial's driver."""
    share = max(1.0, cpus_per_trial // workers) if cpus_per_trial >= workers else cpus_per_trial / workers
    return round(share - _LEFT_FOR_DRIVERS * min(1.0, share), 3)


def shortage(workers: int, cpus: float, use_gpu: bool) -> str | None:
    """What the workers of a run must wait for, in words; None if all of it is free.

    cpus: CPUs of each worker.
    """
    needed = {"CPU": workers * cpus, "GPU": float(workers * use_gpu)}
    free = ray.available_resources()
    short = [name for name, amount in needed.items() if free.get(name, 0.0) < amount - _ROUNDING]
    return " and ".join(f"{needed[name]:g} {name}s ({free.get(name, 0.0):g} free)" for name in short) or None


def use_reserved_cpus() -> int:
    """Compute with one thread for each CPU that Ray has reserved for this process; returns the number."""
    return hardware.set_threads(ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0))


def max_concurrent_runs(cpus_per_run: int, workers: int, use_gpu: bool, limit: int | None) -> int:
    """How many runs fit on the cluster at a time, at most `limit`. Raises UserError if none does."""
    cpus = capacity("CPU")
    fitting = int(cpus // cpus_per_run)
    if fitting < 1:
        raise UserError(f"cpus_per_trial={cpus_per_run}: the cluster has {cpus:g}; lower it, or add nodes")
    if use_gpu:
        fitting = min(fitting, int(capacity("GPU") // workers))
    return min(fitting, limit or fitting)
