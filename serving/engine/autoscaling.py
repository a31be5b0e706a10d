"""Autoscaling by branches, since one request may hold many of them."""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext


class BranchLoadPolicy:
    """Number of replicas needed for the live and the waiting branches.

    For `ray.serve.config.AutoscalingPolicy`; Serve applies its delays and bounds to the result.
    """

    def __init__(self, branches_per_replica: float) -> None:
        self._branches_per_replica = branches_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        metrics = context.aggregated_metrics or {}
        branches = sum(sum(metrics.get(name, {}).values()) for name in ("live_branches", "waiting_branches"))
        replicas = max(branches, context.total_queued_requests or 0) / self._branches_per_replica
        return max(replicas, 1.0 if context.total_num_requests else 0.0), {}
