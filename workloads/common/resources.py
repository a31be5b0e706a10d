"""What a cluster offers, and how runs and workers divide it."""

from __future__ import annotations

import os

import workloads.common.ray_env  # noqa: F401  (before Ray)

# isort: split
import ray

from parallelmind.errors import UserError


def capacity(resource: str) -> float:
    """Total amount of a resource that the cluster has, or that its autoscaler can add.

    Ray does not report what its autoscaler may add; $PARALLELMIND_GROWS_TO holds it, as `CPU=96,GPU=4`.
    Raises UserError if that variable cannot be parsed.
    """
    grows_to = os.environ.get("PARALLELMIND_GROWS_TO", "")
    try:
        pairs = [item.split("=") for item in grows_to.split(",") if item]
        maximum = {name: float(amount) for name, amount in pairs}
    except ValueError as error:
        raise UserError(
            f"$PARALLELMIND_GROWS_TO={grows_to}: not a list of resources; write CPU=96,GPU=4"
        ) from error
    return max(ray.cluster_resources().get(resource, 0.0), maximum.get(resource, 0.0))


def total_cpus() -> float:
    """CPUs of the cluster, at least one."""
    return capacity("CPU") or 1.0


def threads_per_process(processes: int) -> int:
    """Compute threads of each of `processes` that run at a time; $OMP_NUM_THREADS overrides it."""
    return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, int(total_cpus()) // processes)


def cpus_per_worker(workers: int) -> float:
    """CPUs to reserve for each worker: at most half of all together.

    Ray Data's readers need the rest; without it workers and readers wait for each other forever.
    """
    return max(0.01, round(min(0.5, total_cpus() / (2 * workers)), 2))


def cpus_per_elastic_worker(workers: int) -> float:
    """CPUs to reserve for each worker of an elastic run: 60% of its share of a node.

    With more than half of the share, a worker of a lost node does not fit on a remaining node beside that
    node's own worker; with less than all of it, Ray Data's readers still fit.
    """
    node_cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    shares = {cpus / part for cpus in node_cpus if cpus for part in range(1, workers + 1)}
    share = max(
        (size for size in shares if sum((cpus + 1e-6) // size for cpus in node_cpus) >= workers), default=1.0
    )
    return max(0.01, round(0.6 * share, 2))


def max_concurrent_runs(cpus_per_run: int, workers: int, use_gpu: bool, limit: int | None) -> int:
    """How many runs fit on the cluster at a time, at most `limit`. Raises UserError if none does."""
    cpus = capacity("CPU")
    fitting = int(cpus // cpus_per_run)
    if fitting < 1:
        raise UserError(f"cpus_per_trial={cpus_per_run}: the cluster has {cpus:g}; lower it, or add nodes")
    if use_gpu:
        require_gpus(workers)
        fitting = min(fitting, int(capacity("GPU") // workers))
    return min(fitting, limit or fitting)


def require_gpus(workers: int) -> None:
    """Raise UserError if the cluster cannot have a GPU for every worker; Ray would wait for them forever."""
    gpus = capacity("GPU")
    if gpus < workers:
        raise UserError(
            f"use_gpu=true: num_workers={workers} needs as many GPUs, and the cluster has {gpus:g}; "
            "set use_gpu=false, or run `python -m workloads.doctor use_gpu=true`"
        )
