"""Checks Ray: a local cluster starts, or the given cluster can be joined."""

from __future__ import annotations

import os

from parallelmind.errors import UserError
from workloads.doctor.check import CheckResult, count
from workloads.doctor.config import DoctorConfig


def check_ray(config: DoctorConfig) -> CheckResult:
    """Start or join Ray. Raises UserError if that fails, or if use_gpu is set and the cluster has no GPU."""
    address = config.joined_address
    from workloads.common import cluster  # before Ray, which reads environment variables on import

    # isort: split
    import ray

    cluster.connect(config.ray_address, forward_output=False)
    resources, nodes = ray.cluster_resources(), len(live_nodes())
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    if config.use_gpu is True and not gpus:
        raise UserError("use_gpu=true: the cluster has no GPU; add a node with one, or set use_gpu=false")
    has_token = os.environ.get("RAY_AUTH_MODE") == "token"
    size = f"{count(nodes, 'node')}, {count(cpus, 'CPU')}, {count(gpus, 'GPU')}"
    origin = f"joined {address}" if address else "started a local cluster"
    message = f"Ray {ray.__version__}, {origin}: {size}, token auth {'on' if has_token else 'off'}"
    if address and not has_token:
        remedy = "start it with RAY_AUTH_MODE=token: without, anyone who reaches its ports can run code"
        return CheckResult("warn", message, remedy)
    return CheckResult("ok", message)


def live_nodes() -> dict[str, str]:
    """Display name of every live node, by node id."""
    import ray

    return {
        node["NodeID"]: f"node {node['NodeManagerAddress']} ({node['NodeID'][:6]})"
        for node in ray.nodes()
        if node["Alive"]
    }
